"""The session of a postcopy migration's destination: the messages, and the userfaultfd."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmaproof._mapping import SharedMapping
from dmaproof._userfault import Userfault
from dmaproof.errors import ProtocolError
from dmaproof.vhost_user.messages import (
    MemoryRegion,
    Request,
    encode_memory_table,
    encode_u64,
)
from qmp_tools.testbed.ring_driver import HVA_BASE, PAGE, ram_fd
from support.front_end import FrontEnd

LENGTH = 8 * PAGE


@pytest.fixture
def front() -> Iterator[FrontEnd]:
    front = FrontEnd()
    yield front
    front.close()


def table_reply(front: FrontEnd, fd: int, gpa: int = 0) -> MemoryRegion:
    """Send a memory table of one region, and return the region in the session's answer."""
    table = encode_memory_table([MemoryRegion(gpa, LENGTH, HVA_BASE + gpa, 0)])
    front.send(Request.SET_MEM_TABLE, table, [fd])
    count, *numbers = struct.unpack("<I4xQQQQ", front._receive(Request.SET_MEM_TABLE)[0])
    assert count == 1
    return MemoryRegion(*numbers)


def test_memory_is_used_only_after_the_front_end_knows_its_addresses(front: FrontEnd) -> None:
    userfaultfd = front.begin_postcopy()
    assert str(Path(f"/proc/self/fd/{userfaultfd}").readlink()) == "anon_inode:[userfaultfd]"
    with ram_fd(LENGTH) as fd:
        region = table_reply(front, fd)
        assert (region.gpa, region.length, region.file_offset) == (0, LENGTH, 0)
        assert region.hva != HVA_BASE
        assert not front.session.memory.slots
        front.send(Request.SET_MEM_TABLE, encode_u64(0))
        (slot,) = front.session.memory.slots
        assert slot.address == region.hva
    assert front.ask(Request.POSTCOPY_END) == encode_u64(0)
    assert [event["listens"] for event in front.events if event["event"] == "postcopy"] == [
        True,
        False,
    ]
    os.close(userfaultfd)


def test_pages_of_before_the_postcopy_are_forgotten(front: FrontEnd) -> None:
    with ram_fd(LENGTH) as fd:
        os.close(front.begin_postcopy())
        table_reply(front, fd)
        front.send(Request.SET_MEM_TABLE, encode_u64(0))
        assert front.ask(Request.POSTCOPY_END) == encode_u64(0)
        assert bytes(memoryview(front.session.memory.slots[0].mapping)[:4]) == bytes(4), (
            "no wait any more"
        )


def test_after_the_end_a_memory_table_is_used_at_once(front: FrontEnd) -> None:
    os.close(front.begin_postcopy())
    assert front.ask(Request.POSTCOPY_END) == encode_u64(0)
    with ram_fd(LENGTH) as fd:
        front.set_memory(fd, (0, LENGTH, 0))
        assert len(front.session.memory.slots) == 1


def test_the_writes_of_a_listening_device_are_recorded(front: FrontEnd) -> None:
    assert not front.session.journal.recording
    os.close(front.begin_postcopy())
    assert front.session.journal.recording


def test_to_listen_without_an_advice_is_refused(front: FrontEnd) -> None:
    with pytest.raises(ProtocolError, match="expected POSTCOPY_ADVISE before it"):
        front.send(Request.POSTCOPY_LISTEN)


@pytest.mark.parametrize("payload", [b"", bytes(4), bytes(40)])
def test_an_acknowledgement_of_the_wrong_size_is_refused(front: FrontEnd, payload: bytes) -> None:
    os.close(front.begin_postcopy())
    with ram_fd(LENGTH) as fd:
        table_reply(front, fd)
        with pytest.raises(ProtocolError, match="SET_MEM_TABLE"):
            front.send(Request.SET_MEM_TABLE, payload)


def test_a_new_postcopy_ends_the_one_before(front: FrontEnd) -> None:
    with ram_fd(LENGTH) as fd:
        os.close(front.begin_postcopy())
        table_reply(front, fd)
        os.close(front.begin_postcopy())
        table_reply(front, fd)
        front.send(Request.SET_MEM_TABLE, encode_u64(0))
        assert len(front.session.memory.slots) == 1


def test_the_answer_to_a_memory_table_has_the_form_of_a_table() -> None:
    regions = [MemoryRegion(0, PAGE, 1 << 40, 0), MemoryRegion(1 << 32, PAGE, 1 << 41, PAGE)]
    encoded = encode_memory_table(regions)
    assert encoded[:8] == struct.pack("<II", 2, 0)
    assert len(encoded) == 8 + 2 * 32


def test_the_userfaultfd_is_closed_when_the_front_end_hangs_up() -> None:
    front_end, back_end = socket.socketpair()
    with back_end, ram_fd(PAGE) as fd:
        userfault = Userfault(back_end.fileno())
        mapping = SharedMapping(fd, PAGE, 0)
        userfault.register(mapping)
        front_end.close()
        deadline = time.monotonic() + 60
        while userfault.fileno() >= 0:
            assert time.monotonic() < deadline, "the userfaultfd is still open"
            time.sleep(0.01)
        assert bytes(memoryview(mapping)[:4]) == bytes(4), "an access must not wait any more"
        userfault.close()


def test_a_closed_userfaultfd_registers_nothing() -> None:
    front_end, back_end = socket.socketpair()
    with front_end, back_end, ram_fd(PAGE) as fd:
        userfault = Userfault(back_end.fileno())
        userfault.close()
        userfault.close()
        assert userfault.fileno() == -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            userfault.register(SharedMapping(fd, PAGE, 0))


def test_memory_that_cannot_be_registered_is_an_error() -> None:
    front_end, back_end = socket.socketpair()
    with front_end, back_end:
        userfault = Userfault(back_end.fileno())
        with pytest.raises(BufferError):
            userfault.register(b"read-only")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            Userfault()  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            Userfault(socket=1)  # type: ignore[call-arg]
        with pytest.raises(OSError, match="Bad file descriptor"):
            Userfault(-1)
        userfault.close()
