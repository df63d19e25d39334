"""The device process and its owner: what neither should ever say to the other."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dmaproof.errors import RefusedError, UntestableError
from qmp_tools.processes.device import Device
from qmp_tools.processes.process import Process


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b"{}",
        b'{"do": "dance"}',
        b'{"do": "evidence"}',
        b'{"do": "evidence", "session": 1, "folder": null}',
    ],
)
def test_a_command_that_is_none_ends_the_process(line: bytes) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(theirs.fileno())]
    with ours, theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        ours.sendall(line + b"\n")
        _, told = process.communicate(timeout=900)
    assert process.returncode == 2
    assert told.startswith(b"dmaproof device: control socket: ")
    assert b"is no command" in told
    assert len(told.splitlines()) == 1


def test_evidence_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    peer, device_peer = socket.socketpair()
    command = [
        *(sys.executable, "-m", "dmaproof.vhost_user"),
        *("--control", str(theirs.fileno()), "--fd", f"a={device_peer.fileno()}"),
    ]
    fds = [theirs.fileno(), device_peer.fileno()]
    with ours, theirs, peer, device_peer:
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE)
        request = {"do": "evidence", "session": "a", "folder": str(tmp_path / "none")}
        ours.sendall(json.dumps(request).encode() + b"\n")
        _, told = process.communicate(timeout=900)
    assert process.returncode == 2
    assert b"evidence into" in told
    assert len(told.splitlines()) == 1


async def listen(said: bytes) -> Device:
    """A device that has said `said` and is gone."""
    reader = asyncio.StreamReader()
    reader.feed_data(said)
    reader.feed_eof()
    process = SimpleNamespace(how_it_ended=lambda: "was killed", log_tail=lambda: "")
    device = Device(cast(Process, process), cast(asyncio.StreamWriter, None), 60)
    device._listening = asyncio.ensure_future(device._listen(reader))
    await device._listening
    return device


EVENT = b'{"event": "connected", "session": "source"}\n'


def test_a_device_that_dies_in_mid_word() -> None:
    async def story() -> None:
        device = await listen(EVENT + EVENT[:20])
        assert (await device.wait_for("connected", "source"))["event"] == "connected"
        assert not device.refused.done()
        with pytest.raises(UntestableError, match="the device was killed"):
            await device.wait_for("listening", "source")

    asyncio.run(story())


@pytest.mark.parametrize("line", [b"{", b"null", b"[1]", b'{"event": "refused"}', b"\xff"])
def test_a_device_that_says_nonsense(line: bytes) -> None:
    async def story() -> None:
        device = await listen(EVENT + line + b"\n")
        with pytest.raises(
            UntestableError, match="the device said something unintelligible"
        ) as caught:
            raise device.refused.result()
        assert not isinstance(caught.value, RefusedError)

    asyncio.run(story())


def test_what_a_device_refuses_is_told() -> None:
    async def story() -> None:
        refused = b'{"event": "refused", "session": "source", "message": "ring 2"}\n'
        device = await listen(refused)
        with pytest.raises(
            RefusedError, match="refused what the source QEMU or its guest sent: ring 2"
        ):
            raise device.refused.result()

    asyncio.run(story())
