"""The device process and its parent: messages that neither should send to the other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dmaproof.errors import RefusedError, UntestableError
from qmp_tools.devices.process import Device
from qmp_tools.host.process import Process

KILLED = cast(
    Process,
    SimpleNamespace(name="device", how_it_ended=lambda: "was killed", log_tail=lambda: ""),
)


async def listen(sent_bytes: bytes) -> Device:
    """Return a device that has sent `sent_bytes` and has then disconnected."""
    reader = asyncio.StreamReader()
    reader.feed_data(sent_bytes)
    reader.feed_eof()
    device = Device(KILLED, reader, cast(asyncio.StreamWriter, None), 60)
    await device.silent
    return device


EVENT = b'{"event": "connected", "session": "source"}\n'


def test_a_device_that_dies_in_the_middle_of_an_event_is_reported() -> None:
    async def scenario() -> None:
        device = await listen(EVENT + EVENT[:20])
        assert (await device.wait_for("connected", "source"))["event"] == "connected"
        assert not device.refused.done()
        with pytest.raises(UntestableError, match="the device was killed"):
            await device.wait_for("listening", "source")

    asyncio.run(scenario())


@pytest.mark.parametrize("line", [b"{", b"null", b"[1]", b'{"event": "refused"}', b"\xff"])
def test_an_unintelligible_event_is_reported(line: bytes) -> None:
    async def scenario() -> None:
        device = await listen(EVENT + line + b"\n")
        with pytest.raises(
            UntestableError, match="the device process sent a line that is not an event"
        ) as caught:
            raise device.refused.result()
        assert not isinstance(caught.value, RefusedError)

    asyncio.run(scenario())


def test_a_refusal_of_the_device_is_reported() -> None:
    async def scenario() -> None:
        refused = b'{"event": "refused", "session": "source", "message": "ring 2"}\n'
        device = await listen(refused)
        with pytest.raises(
            RefusedError, match="refused what the source QEMU or its guest sent: ring 2"
        ):
            raise device.refused.result()

    asyncio.run(scenario())


def test_an_error_that_stops_the_device_is_reported() -> None:
    async def scenario() -> None:
        event = {"event": "failed", "session": "", "message": "No space left on device"}
        device = await listen(json.dumps(event).encode() + b"\n")
        with pytest.raises(UntestableError, match="cannot continue: No space left on device"):
            await device.wait_for("listening", "source")
        assert device.refused.done()

    asyncio.run(scenario())


def test_evidence_that_could_not_be_written_is_reported(tmp_path: Path) -> None:
    async def scenario() -> None:
        answer = {"event": "evidence", "session": "source", "found": True}
        answer["error"] = "No space left on device"
        reader = asyncio.StreamReader()
        sent: list[bytes] = []

        async def drain() -> None:
            reader.feed_data(json.dumps(answer).encode() + b"\n")

        control = SimpleNamespace(write=sent.append, drain=drain)
        device = Device(KILLED, reader, cast(asyncio.StreamWriter, control), 60)
        with pytest.raises(UntestableError, match=r"No space left on device; set TMPDIR"):
            await device.evidence("source", tmp_path)
        assert json.loads(sent[0])["do"] == "evidence"
        reader.feed_eof()
        await device.silent

    asyncio.run(scenario())
