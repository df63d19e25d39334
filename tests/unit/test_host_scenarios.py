"""Scenarios that only some hosts can carry out: what they need, and what dmaproof says without."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from dmaproof.errors import UnsupportedError, UntestableError
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.migration.scenarios import find_scenario
from qmp_tools.migration.transport import Ends
from qmp_tools.qemu.machine import MIB, Machine
from qmp_tools.qemu.qmp import Qmp

ANY_PORT = 0xFFFFFFFF


class Loopback:
    """A vsock socket that can be bound only if the host `has_loopback`."""

    has_loopback = True
    bound: tuple[int, int] | None = None

    def __init__(self, family: int, kind: int) -> None:
        assert (family, kind) == (socket.AF_VSOCK, socket.SOCK_STREAM)

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def bind(self, address: tuple[int, int]) -> None:
        if not self.has_loopback:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        type(self).bound = address


class Listening:
    """A destination that listens at a port that the kernel has chosen."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, dict[str, Any]]] = []

    async def execute(self, command: str, **arguments: Any) -> Any:
        self.commands.append((command, arguments))
        return {"socket-address": [{"type": "vsock", "cid": "1", "port": "4711"}]}


def test_a_host_without_vsock_loopback_is_told_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Loopback)
    monkeypatch.setattr(Loopback, "has_loopback", False)
    with pytest.raises(UntestableError, match="sudo modprobe vsock_loopback") as caught:
        find_scenario("vsock").require_host()
    assert not isinstance(caught.value, UnsupportedError)
    assert os.strerror(errno.EADDRNOTAVAIL) in str(caught.value)


def test_a_host_with_vsock_loopback_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Loopback)
    find_scenario("vsock").require_host()
    assert Loopback.bound == (1, ANY_PORT)


def test_the_source_connects_to_the_vsock_port_that_the_kernel_chose(tmp_path: Path) -> None:
    source, destination = Listening(), Listening()
    ends = Ends(cast(Qmp, source), cast(Qmp, destination), tmp_path)
    asyncio.run(find_scenario("vsock").begin(ends))
    assert destination.commands[0] == ("migrate-incoming", {"uri": f"vsock:1:{ANY_PORT}"})
    assert source.commands == [("migrate", {"uri": "vsock:1:4711"})]


def test_a_dirty_limit_needs_kvm() -> None:
    scenario = find_scenario("dirty-limit")
    scenario.require_accelerator("kvm")
    with pytest.raises(
        UnsupportedError, match="needs KVM's dirty ring, and the accelerator is tcg"
    ):
        scenario.require_accelerator("tcg")


def test_a_dirty_limit_was_used_if_qemu_throttled_a_vcpu() -> None:
    scenario = find_scenario("dirty-limit")
    assert not scenario.is_exercised_in({"dirty-limit-throttle-time-per-round": 0})
    assert scenario.is_exercised_in({"dirty-limit-throttle-time-per-round": 1000})


def test_a_machine_has_the_options_of_its_accelerator() -> None:
    options = find_scenario("dirty-limit").added
    machine = Machine(X86_64, "q35", "kvm", 128 * MIB, 1, Path("kernel"), added=options)
    words = machine.arguments()
    assert words[words.index("-accel") + 1] == "kvm,dirty-ring-size=4096"
