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
from qmp_tools.devices.process import Device
from qmp_tools.host.process import Process


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
        theirs.close()
        with ours.makefile() as said:
            answer = next(it for line in said if (it := json.loads(line))["event"] == "evidence")
            ours.shutdown(socket.SHUT_RDWR)
        _, told = process.communicate(timeout=900)
    assert "No such file or directory" in answer["error"]
    assert (process.returncode, told) == (0, b"")


async def listen(said: bytes) -> Device:
    """A device that has said `said` and is gone."""
    reader = asyncio.StreamReader()
    reader.feed_data(said)
    reader.feed_eof()
    process = SimpleNamespace(name="device", how_it_ended=lambda: "was killed", log_tail=lambda: "")
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


def test_a_device_whose_log_is_on_the_full_disk_tells_its_owner() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(theirs.fileno())]
    command += ["--device", "blk:file=/dev/full"]
    with ours, theirs, Path("/dev/full").open("w") as log:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=log)
        theirs.close()
        with ours.makefile() as said:
            (event,) = map(json.loads, said)
        assert process.wait(timeout=120) == 2
    assert event["event"] == "failed"
    assert "/dev/full is not a regular file" in event["message"]


def test_what_keeps_a_device_from_going_on_is_told() -> None:
    async def story() -> None:
        said = {"event": "failed", "session": "", "message": "No space left on device"}
        device = await listen(json.dumps(said).encode() + b"\n")
        with pytest.raises(UntestableError, match="cannot go on: No space left on device"):
            await device.wait_for("listening", "source")
        assert device.refused.done()

    asyncio.run(story())


def test_evidence_that_could_not_be_written_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        device = await listen(b"")
        answer = {"event": "evidence", "there_is": True, "error": "No space left on device"}
        sent: list[bytes] = []

        async def drain() -> None:
            device._latest["evidence", "source"] = answer

        device._control = cast(
            asyncio.StreamWriter, SimpleNamespace(write=sent.append, drain=drain)
        )
        with pytest.raises(UntestableError, match=r"No space left on device; set TMPDIR"):
            await device.evidence("source", tmp_path)
        assert json.loads(sent[0])["do"] == "evidence"

    asyncio.run(story())
