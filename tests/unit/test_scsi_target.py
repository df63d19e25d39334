"""The virtio side of the tests' vhost-user-scsi target: requests, responses and what it logs."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from dmaproof.dma import Dma
from dmaproof.errors import ProtocolError
from dmaproof.virtqueue import DescriptorChain, Segment
from qmp_tools.testbed.ring_driver import PAGE, guest_memory, ram_fd
from scsi_disk import BLOCK_BYTES, LBA_OUT_OF_RANGE, ScsiDisk
from scsi_target import BAD_TARGET, CHECK_CONDITION, FAILURE, GOOD, OK, OVERRUN, ScsiTarget
from support.rings import Marks, dma_for

RAM_BYTES = 64 * PAGE
REQUEST, RESPONSE, DATA = PAGE, 2 * PAGE, 8 * PAGE
REQUEST_BYTES, RESPONSE_BYTES = 51, 108
CONTROL, EVENT, FIRST_REQUEST_QUEUE = 0, 1, 2
BLOCKS = 64
INQUIRY, READ_10, WRITE_10 = 0x12, 0x28, 0x2A
UNIT_0 = bytes((1, 0, 0x40, 0, 0, 0, 0, 0))


class Response(NamedTuple):
    """The fields of a response, and the number of bytes that the target says it wrote."""

    residual: int
    status: int
    response: int
    sense: bytes
    written: int


class Guest:
    """A guest's driver, which calls the target directly."""

    def __init__(self, fd: int, disk_fd: int) -> None:
        os.pwrite(disk_fd, b"".join(bytes([n]) * BLOCK_BYTES for n in range(BLOCKS)), 0)
        self.target = ScsiTarget(ScsiDisk(disk_fd))
        self.marks = Marks()
        self.dma: Dma = dma_for(guest_memory(fd, (0, RAM_BYTES, 0)), marks=self.marks)
        self.dma.journal.queue = FIRST_REQUEST_QUEUE

    def put(self, gpa: int, data: bytes) -> None:
        self.dma.memory.view(gpa, len(data))[:] = data

    def get(self, gpa: int, length: int) -> bytes:
        return bytes(self.dma.memory.view(gpa, length))

    def carry_out(self, readable: list[Segment], writable: list[Segment]) -> int:
        return self.target.process(
            DescriptorChain(0, 1, readable=readable, writable=writable), self.dma
        )

    def command(
        self,
        cdb: bytes,
        *,
        address: bytes = UNIT_0,
        sent: Sequence[Segment] = (),
        wanted: Sequence[Segment] = (),
    ) -> Response:
        """Carry out a command that sends some buffers and wants others to be filled."""
        self.put(REQUEST, struct.pack("<8sQBBB32s", address, 7, 0, 0, 0, cdb))
        self.put(RESPONSE, b"\xff" * RESPONSE_BYTES)
        written = self.carry_out(
            [Segment(REQUEST, REQUEST_BYTES), *sent], [Segment(RESPONSE, RESPONSE_BYTES), *wanted]
        )
        length, residual, _, status, response, sense = struct.unpack(
            "<IIHBB96s", self.get(RESPONSE, RESPONSE_BYTES)
        )
        return Response(residual, status, response, sense[:length], written)


@pytest.fixture
def guest() -> Iterator[Guest]:
    disk_fd = os.memfd_create("disk")
    with ram_fd(RAM_BYTES) as fd:
        yield Guest(fd, disk_fd)
    os.close(disk_fd)


def on_blocks(operation: int, first: int, count: int) -> bytes:
    return struct.pack(">BxIxH", operation, first, count)


def test_data_for_the_guest_is_spread_over_its_buffers_and_logged(guest: Guest) -> None:
    pieces = [Segment(DATA + 256, 256), Segment(DATA + PAGE, 768)]
    answer = guest.command(on_blocks(READ_10, 3, 2), wanted=pieces)
    assert answer == (0, GOOD, OK, b"", RESPONSE_BYTES + 2 * BLOCK_BYTES)
    assert guest.get(DATA + 256, 256) == b"\3" * 256
    assert guest.get(DATA + PAGE, 768) == b"\3" * 256 + b"\4" * BLOCK_BYTES
    assert guest.marks.ranges == [*pieces, (RESPONSE, RESPONSE_BYTES)]


def test_data_of_the_guest_is_written_to_the_disk(guest: Guest) -> None:
    content = os.urandom(BLOCK_BYTES)
    guest.put(DATA, content)
    halves = [Segment(DATA, 256), Segment(DATA + 256, 256)]
    answer = guest.command(on_blocks(WRITE_10, 9, 1), sent=halves)
    assert answer == (0, GOOD, OK, b"", RESPONSE_BYTES)
    guest.command(on_blocks(READ_10, 9, 1), wanted=[Segment(DATA + PAGE, BLOCK_BYTES)])
    assert guest.get(DATA + PAGE, BLOCK_BYTES) == content


def test_a_shorter_answer_leaves_a_residual(guest: Guest) -> None:
    answer = guest.command(bytes((INQUIRY, 0, 0, 0, 96)), wanted=[Segment(DATA, 96)])
    assert answer == (96 - 36, GOOD, OK, b"", RESPONSE_BYTES + 36)


def test_a_failed_command_has_sense_data_and_no_other(guest: Guest) -> None:
    answer = guest.command(on_blocks(READ_10, BLOCKS, 1), wanted=[Segment(DATA, BLOCK_BYTES)])
    assert answer[:3] == (BLOCK_BYTES, CHECK_CONDITION, OK)
    assert len(answer.sense) == 18
    assert int.from_bytes(answer.sense[12:14]) == LBA_OUT_OF_RANGE
    assert answer.written == RESPONSE_BYTES
    assert guest.marks.ranges == [(RESPONSE, RESPONSE_BYTES)]


def test_buffers_that_are_too_short_are_an_overrun(guest: Guest) -> None:
    short = [Segment(DATA, BLOCK_BYTES - 1)]
    read = guest.command(on_blocks(READ_10, 0, 1), wanted=short)
    write = guest.command(on_blocks(WRITE_10, 0, 1), sent=short)
    assert read == write == (BLOCK_BYTES - 1, GOOD, OVERRUN, b"", RESPONSE_BYTES)


@pytest.mark.parametrize(
    "address",
    [bytes((1, 1, 0x40, 0)), bytes((2, 0, 0x40, 0)), bytes((1, 0, 0, 0)), bytes((1, 0, 0x80, 0))],
)
def test_another_target_does_not_exist(guest: Guest, address: bytes) -> None:
    inquiry = bytes((INQUIRY, 0, 0, 0, 36))
    answer = guest.command(inquiry, address=address.ljust(8, b"\0"), wanted=[Segment(DATA, 36)])
    assert answer == (36, GOOD, BAD_TARGET, b"", RESPONSE_BYTES)


def test_another_unit_of_the_target_is_reported_missing(guest: Guest) -> None:
    unit_256 = bytes((1, 0, 0x41, 0)).ljust(8, b"\0")
    guest.command(bytes((INQUIRY, 0, 0, 0, 36)), address=unit_256, wanted=[Segment(DATA, 36)])
    assert guest.get(DATA, 1) == b"\x7f"


@pytest.mark.parametrize(
    ("readable", "writable"),
    [(REQUEST_BYTES - 1, RESPONSE_BYTES), (REQUEST_BYTES, RESPONSE_BYTES - 1)],
)
def test_a_request_that_is_too_short_is_refused(guest: Guest, readable: int, writable: int) -> None:
    with pytest.raises(ProtocolError, match="expected 51 readable and 108 writable bytes"):
        guest.carry_out([Segment(REQUEST, readable)], [Segment(RESPONSE, writable)])


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (0, bytes((OK,))),
        (1, bytes((0, 0, 0, 0, OK))),
        (2, bytes((0, 0, 0, 0, OK))),
        (3, bytes((FAILURE,))),
    ],
)
def test_control_requests_are_answered(guest: Guest, kind: int, answer: bytes) -> None:
    guest.dma.journal.queue = CONTROL
    guest.put(REQUEST, struct.pack("<I20x", kind))
    guest.put(RESPONSE, b"\xff" * 8)
    written = guest.carry_out([Segment(REQUEST, 24)], [Segment(RESPONSE, 5)])
    assert written == len(answer)
    assert guest.get(RESPONSE, 8) == answer.ljust(8, b"\xff")
    assert guest.marks.ranges == [(RESPONSE, len(answer))]


@pytest.mark.parametrize(("readable", "writable"), [(3, 5), (16, 4)])
def test_a_control_request_that_is_too_short_is_refused(
    guest: Guest, readable: int, writable: int
) -> None:
    guest.dma.journal.queue = CONTROL
    guest.put(REQUEST, struct.pack("<I", 1))
    with pytest.raises(ProtocolError, match="SCSI control request 1 is shorter"):
        guest.carry_out([Segment(REQUEST, readable)], [Segment(RESPONSE, writable)])


def test_no_buffer_of_the_event_queue_is_used(guest: Guest) -> None:
    ready = [queue for queue in range(guest.target.queues) if guest.target.is_ready(queue)]
    assert ready == [CONTROL, *range(FIRST_REQUEST_QUEUE, guest.target.queues)]
