"""Scenarios that reset the guest's device or machine, and the reset of a machine over QMP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from qemu.qmp import EventListener

from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError
from qmp_tools.guest.channel import LEAVE_OUT_HALF, GuestChannel
from qmp_tools.migration.attempt import Attempt
from qmp_tools.migration.hold import PrecopyHold
from qmp_tools.migration.pair import QemuPair, ResetReason
from qmp_tools.migration.scenarios import find_scenario
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import resolve
from qmp_tools.qemu.machine import SOURCE
from support.setups import setup

RESETS = ("device-reset", "driver-reload", "guest-reboot", "machine-reset")


class ResetPair:
    """A pair that records what its source is sent; its trace shows the logs `installed` so far."""

    source_side = SOURCE

    def __init__(self, installed: Sequence[int | None]) -> None:
        self.installed = list(installed)
        self.sent: list[object] = []
        self.hold_pages = (0x5000,)
        self.device = mock.AsyncMock(is_killed=False)
        self.source = SimpleNamespace(name="source QEMU")
        self.source_guest = self
        self.guests = {SOURCE: self}
        self.qemus = {SOURCE: SimpleNamespace(qmp=None)}

    def logs_installed(self, side: str) -> int | None:
        return self.installed.pop(0)

    def number(self, verb: str, key: str) -> int:
        return 8192

    async def wait_for(self, reached: Any, what: str) -> None:
        assert reached()
        assert what == "used 2048 write-once pages"

    async def ask(self, command: bytes, verb: str, what: str) -> None:
        self.sent.append(verb)

    async def send(self, command: bytes) -> None:
        self.sent.append(command)

    async def reboot(self, side: str, reset: Any, reason: ResetReason) -> None:
        self.sent.append(reason)


def reset_amid_precopy(name: str, pair: ResetPair) -> tuple[bool, mock.AsyncMock]:
    """Reset as the scenario `name`; return its answer, and the hold of the precopy."""
    attempt = SimpleNamespace(
        pair=pair,
        used_write_once_pages=lambda: 2048,
        release_log=mock.Mock(),
        end_log_watch=mock.Mock(),
        watch_new_log=mock.AsyncMock(),
        watch_log=mock.AsyncMock(),
        migration=mock.Mock(),
    )
    hold = mock.AsyncMock()
    starts_over = asyncio.run(
        find_scenario(name).amid_precopy(cast(Attempt, attempt), cast(PrecopyHold, hold))
    )
    attempt.migration.restart_timeout.assert_called_once_with()
    assert attempt.watch_log.called is not starts_over, "the guest that reboots starts it later"
    return starts_over, hold


@pytest.mark.parametrize(
    ("name", "sent", "starts_over"),
    [
        ("device-reset", ["device-reset"], False),
        ("driver-reload", ["driver-reloaded"], False),
        ("guest-reboot", [ResetReason.GUEST, LEAVE_OUT_HALF], True),
        ("machine-reset", [ResetReason.OPERATOR, LEAVE_OUT_HALF], True),
    ],
)
@pytest.mark.parametrize("installed", [(1, 2), (1, 4), (None, None)])
def test_a_guest_that_rebooted_uses_other_write_once_pages(
    name: str, sent: list[object], starts_over: bool, installed: tuple[int | None, ...]
) -> None:
    pair = ResetPair(installed)
    answer, hold = reset_amid_precopy(name, pair)
    assert (answer, pair.sent) == (starts_over, sent)
    hold.rest.assert_awaited_once_with()
    assert hold.pages == pair.hold_pages


@pytest.mark.parametrize("name", RESETS)
@pytest.mark.parametrize("installed", [(0, 0), (3, 3)])
def test_a_reset_that_does_not_reach_the_device_is_not_a_proof(
    name: str, installed: tuple[int, ...]
) -> None:
    with pytest.raises(UntestableError, match=f"was not reset .* shows {installed[0]} dirty logs"):
        reset_amid_precopy(name, ResetPair(installed))


def test_a_device_that_is_to_be_killed_is_killed_too() -> None:
    pair = ResetPair((1, 2))
    pair.device.is_killed = True
    reset_amid_precopy("device-reset", pair)
    pair.device.inject_restart.assert_awaited_once_with(SOURCE)


# The choice of a scenario -------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESETS)
def test_only_a_disk_is_reset(name: str) -> None:
    with pytest.raises(UsageError, match="echo is not a disk"):
        asyncio.run(resolve(ProofOptions(scenario=name, device="echo")))


def test_a_fault_of_a_reset_needs_a_scenario_with_a_reset() -> None:
    options = ProofOptions(scenario="tls", fault="log-forgotten-at-reset")
    with pytest.raises(UsageError, match="use --scenario device-reset"):
        asyncio.run(resolve(options))
    for name in ("unix", *RESETS):  # unix is the default, in whose place device-reset is chosen
        options = ProofOptions(scenario=name, fault="log-forgotten-at-reset", device="echo")
        chosen = "device-reset" if name == "unix" else name
        with pytest.raises(UsageError, match=f"--scenario {chosen} needs a disk"):
            asyncio.run(resolve(options))


# The reset of a machine ---------------------------------------------------------------------------


class RebootedGuest:
    """A guest that is ready once it has been reset; `errors` are those of the test."""

    def __init__(self) -> None:
        self.latest = {"ready": "before"}
        self.hold_pages = [0x1000]

    def await_boot(self) -> None:
        self.latest = {}

    async def wait_for(self, reached: Any, what: str) -> None:
        assert not reached(), "the report of the guest before"
        self.latest, self.hold_pages = {"ready": "after"}, [0x9000]
        assert reached()


class RebootingQmp:
    """A QEMU that records what it has to do when its machine is reset."""

    name = "source QEMU"

    def __init__(self) -> None:
        self.actions: list[str] = []
        self.listener = EventListener()

    async def execute(self, command: str, *, reboot: str) -> None:
        assert command == "set-action"
        self.actions.append(reboot)

    @contextlib.asynccontextmanager
    async def events(self, name: str) -> AsyncIterator[EventListener]:
        assert name == "RESET"
        yield self.listener


def reboot(
    folder: Path, reasons: Sequence[str], timeout_s: float = 60
) -> tuple[QemuPair, RebootingQmp]:
    """Reset the source's machine, for which QEMU reports the `reasons`."""
    qmp = RebootingQmp()
    pair = QemuPair(setup().machine, {}, mock.Mock(), folder, timeout_s=timeout_s)
    pair.qemus[SOURCE] = cast(Any, SimpleNamespace(qmp=qmp))
    pair.guests[SOURCE] = cast(GuestChannel, RebootedGuest())

    async def reset() -> None:
        for reason in reasons:
            await qmp.listener.put(cast(Any, {"event": "RESET", "data": {"reason": reason}}))

    asyncio.run(pair.reboot(SOURCE, reset, ResetReason.GUEST))
    return pair, qmp


def test_only_while_a_machine_is_reset_qemu_survives_a_reset(tmp_path: Path) -> None:
    pair, qmp = reboot(tmp_path, ["guest-reset", "guest-reset"])
    assert qmp.actions == ["reset", "shutdown"]
    assert pair.hold_pages == (0x9000,)


def test_a_machine_that_is_reset_for_another_reason_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="for the reason 'guest-panic'"):
        reboot(tmp_path, ["guest-panic"])


def test_a_machine_that_is_not_reset_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WaitTimeoutError, match="has not reset its machine within"):
        reboot(tmp_path, [], timeout_s=0.05)
