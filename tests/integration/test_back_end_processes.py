"""The back ends that a proof starts: they listen, end, and are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from dmaproof.errors import UntestableError, WaitTimeoutError
from qmp_tools.devices import command
from qmp_tools.devices.command import CommandDevice
from qmp_tools.devices.device import AttachedDevice
from qmp_tools.host.process import ProcessDiedError
from qmp_tools.qemu.machine import DESTINATION, SOURCE
from support.command import is_alive

LISTENS = (
    sys.executable,
    "-c",
    "import socket, sys, time\n"
    "print('side', sys.argv[2], flush=True)\n"
    "listener = socket.socket(socket.AF_UNIX)\n"
    "listener.bind(sys.argv[1])\n"
    "listener.listen()\n"
    "time.sleep(1000)",
    "{socket}",
    "{side}",
)


BINDS: Final = LISTENS[2].partition("listener.listen()")[0]
OWN_NETWORK: Final = ("unshare", "--map-root-user", "--net")


@contextlib.asynccontextmanager
async def attached(folder: Path, *words: str) -> AsyncIterator[AttachedDevice]:
    async with CommandDevice("blk", words).start(folder, 60) as device:
        yield device


def test_a_listener_in_its_own_network_namespace_is_found_until_it_ends(tmp_path: Path) -> None:
    if subprocess.run([*OWN_NETWORK, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this user may not make network namespaces")
    path = tmp_path / "socket"
    words = [word.format(socket=path, side=SOURCE) for word in (*OWN_NETWORK, *LISTENS)]
    with subprocess.Popen(words) as backend:
        deadline = time.monotonic() + 60
        while not command.listens(path, backend.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert str(path) not in Path("/proc/net/unix").read_text()
        assert command.listens(path, os.getpid())  # as for a socket of a shell's grandchild
        backend.kill()
    assert path.is_socket()
    assert not command.listens(path, os.getpid())


def test_each_side_has_a_back_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with attached(tmp_path, *LISTENS) as device:
            for side in (SOURCE, DESTINATION):
                arguments = await device.attach(side)
                assert f"socket,id=device,path={tmp_path / side}-disk.sock" in arguments
                assert (tmp_path / f"{side}-device.log").read_text() == f"side {side}\n"
            first = device.processes
            device.release(DESTINATION)
            await device.attach(DESTINATION)
            assert not is_alive(first[1].pid)
            assert [process.name for process in device.processes] == [
                "source device",
                "destination device",
            ]
            assert device.processes[0] is first[0]
            assert await device.evidence(SOURCE) == []
            pids = [process.pid for process in device.processes]
        assert not any(is_alive(pid) for pid in pids)

    asyncio.run(scenario())


def test_a_back_end_that_ends_is_reported_with_its_last_output(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with attached(
            tmp_path, "sh", "-c", "echo no such option; exit 5", "{socket}"
        ) as device:
            with pytest.raises(ProcessDiedError, match=r"exit code 5\n.*\n +no such option"):
                await device.attach(SOURCE)

    asyncio.run(scenario())


def test_a_back_end_that_binds_and_ends_is_reported_with_its_last_output(tmp_path: Path) -> None:
    async def scenario() -> None:
        words = (sys.executable, "-c", f"{BINDS}sys.exit(5)", "{socket}", "{side}")
        async with attached(tmp_path, *words) as device:
            with pytest.raises(ProcessDiedError, match=r"exit code 5\n.*\n +side source"):
                await device.attach(SOURCE)

    asyncio.run(scenario())


def test_a_wait_that_began_earlier_notices_the_end_of_the_back_end(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with attached(tmp_path, *LISTENS) as device:
            refusal = asyncio.ensure_future(device.refusal())
            await device.attach(SOURCE)
            await device.attach(DESTINATION)
            device.release(SOURCE)
            for process in device.processes:
                os.kill(process.pid, signal.SIGTERM)
            assert str(await refusal).startswith("destination device was killed by SIGTERM")

    asyncio.run(scenario())


def test_a_wait_for_a_back_end_that_does_not_listen_ends_with_the_timeout(tmp_path: Path) -> None:
    async def scenario() -> None:
        words = ("sh", "-c", "sleep 1000", "{socket}")
        async with CommandDevice("blk", words).start(tmp_path, 0.1) as device:
            with pytest.raises(
                WaitTimeoutError, match=r"source device does not listen on .* 0\.1 s"
            ):
                await device.attach(SOURCE)
            (backend,) = device.processes
        assert not is_alive(backend.pid)

    asyncio.run(scenario())


def test_a_program_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with attached(tmp_path, "/nowhere/backend", "{socket}") as device:
            with pytest.raises(UntestableError, match="/nowhere/backend: No such file"):
                await device.attach(SOURCE)

    asyncio.run(scenario())
