"""The back end against front ends that follow the specification, and front ends that break it."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dmaproof.devices import make_device
from dmaproof.devices.blk import Blk
from dmaproof.errors import MemoryAccessError, ProtocolError, UsageError
from dmaproof.stamp import read_stamp
from dmaproof.vhost_user.connection import Connection
from dmaproof.vhost_user.features import PROTOCOL_FEATURES
from dmaproof.vhost_user.inflight import region_bytes
from dmaproof.vhost_user.messages import (
    HEADER_BYTES,
    InflightFile,
    Request,
    encode_inflight,
    encode_request,
    encode_u64,
)
from dmaproof.virtqueue import DescriptorChain, Segment
from qmp_tools.testbed.ring_driver import PAGE, WRITE, Buffer, RingDriver, guest_memory, ram_fd
from support.front_end import FEATURES, FrontEnd

RAM_BYTES = 128 * PAGE
HIGH = 1 << 32
"""The second slot's GPA; the first is at 0."""
RING = 8 * PAGE
HEADER = 20 * PAGE
STATUS = 21 * PAGE + 5
DATA = HIGH + 3 * PAGE
LOG_BYTES = (HIGH + 64 * PAGE) // PAGE // 8
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8


def inflight(queues: int = 2, queue_size: int = 128) -> bytes:
    return encode_inflight(InflightFile(0, 0, queues, queue_size))


class Guest(NamedTuple):
    front_end: FrontEnd
    driver: RingDriver
    ram: int
    log: int


@pytest.fixture
def guest() -> Iterator[Guest]:
    yield from start_guest(FrontEnd())


def start_guest(front_end: FrontEnd) -> Iterator[Guest]:
    with ram_fd(RAM_BYTES) as ram, ram_fd(LOG_BYTES) as log:
        places = ((0, 64 * PAGE, 0), (HIGH, 64 * PAGE, 64 * PAGE))
        driver = RingDriver(guest_memory(ram, *places), RING)
        front_end.send(Request.SET_FEATURES, encode_u64(FEATURES))
        front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        front_end.set_memory(ram, *places)
        front_end.start_ring(driver)
        yield Guest(front_end, driver, ram, log)
        front_end.close()


def request(guest: Guest, kind: int, sector: int, *buffers: Buffer) -> int:
    """Carry out one block request, and return its status byte."""
    driver = guest.driver
    driver.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    driver.write(STATUS, b"\xff")
    chain = [Buffer(HEADER, 16), *buffers, Buffer(STATUS, 1, WRITE)]
    driver.describe(driver.chain(chain))
    driver.publish(0)
    guest.front_end.serve()
    return driver.read(STATUS, 1)[0]


def dirty_pages(log: int) -> set[int]:
    """Return the pages whose bits are set in the log, and clear the log as QEMU does."""
    bits = np.unpackbits(np.frombuffer(os.pread(log, LOG_BYTES, 0), np.uint8), bitorder="little")
    os.pwrite(log, bytes(LOG_BYTES), 0)
    return set(np.flatnonzero(bits).tolist())


def start_logging(guest: Guest) -> None:
    guest.front_end.set_log(guest.log, LOG_BYTES)
    guest.front_end.log_all(True)
    guest.front_end.set_ring_address(guest.driver, logged=True)


# Requests ---------------------------------------------------------------------------------------


def test_every_read_is_stamped_and_unique(guest: Guest) -> None:
    seen = set()
    for number in (1, 2, 3):
        assert request(guest, IN, 80, Buffer(DATA, 2 * PAGE, WRITE)) == 0
        pages = [guest.driver.read(DATA + index * PAGE, PAGE) for index in (0, 1)]
        assert [read_stamp(page) for page in pages] == [(80, number), (88, number)]
        seen.update(pages)
    assert len(seen) == 6
    assert os.eventfd_read(guest.front_end.call) >= 1


def test_a_read_is_scattered_over_unaligned_pieces(guest: Guest) -> None:
    pieces = [Buffer(DATA + 100, 512, WRITE), Buffer(DATA + 9 * PAGE - 7, 1024, WRITE)]
    assert request(guest, IN, 3, *pieces) == 0
    assert request(guest, IN, 0, Buffer(DATA + 20 * PAGE, PAGE, WRITE)) == 0
    scattered = guest.driver.read(pieces[0].address, 512) + guest.driver.read(
        pieces[1].address, 1024
    )
    whole = bytearray(guest.driver.read(DATA + 20 * PAGE, PAGE))
    assert len(scattered) == len(whole[3 * 512 : 6 * 512])
    assert scattered[8:16] != whole[3 * 512 + 8 : 3 * 512 + 16]  # another request, so other content


def test_written_sectors_read_back_as_written(guest: Guest) -> None:
    content = os.urandom(PAGE + 512)
    guest.driver.write(DATA, content)
    assert request(guest, OUT, 21, Buffer(DATA, len(content))) == 0
    assert request(guest, IN, 21, Buffer(DATA + 4 * PAGE, len(content), WRITE)) == 0
    assert guest.driver.read(DATA + 4 * PAGE, len(content)) == content


def test_written_sectors_stay_in_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    content = os.urandom(512)
    for guest in start_guest(FrontEnd(Blk(1 << 30, queues=2, file=image))):
        guest.driver.write(DATA, content)
        assert request(guest, OUT, 21, Buffer(DATA, 512)) == 0
        assert request(guest, FLUSH, 0) == 0
    assert image.stat().st_size == 1 << 30
    assert image.stat().st_blocks * 512 == max(PAGE, image.stat().st_blksize)
    for guest in start_guest(FrontEnd(Blk(file=image, queues=2))):
        assert request(guest, IN, 16, Buffer(DATA, 3 * PAGE, WRITE)) == 0
        assert guest.driver.read(DATA + 5 * 512, 512) == content
        assert read_stamp(guest.driver.read(DATA, PAGE)) is None
        assert read_stamp(guest.driver.read(DATA + PAGE, PAGE)) == (24, 1)


def test_a_flush_reaches_the_disk(monkeypatch: pytest.MonkeyPatch, guest: Guest) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "no disk")

    assert request(guest, FLUSH, 0) == 0
    monkeypatch.setattr(os, "fdatasync", fail)
    assert request(guest, FLUSH, 0) == 1


def test_a_disk_that_is_full_fails_the_request(
    monkeypatch: pytest.MonkeyPatch, guest: Guest
) -> None:
    def fail(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", fail)
    assert request(guest, OUT, 0, Buffer(DATA, PAGE)) == 1
    assert request(guest, IN, 0, Buffer(DATA, PAGE, WRITE)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toaster", "'toaster' is not known; choose one of: blk"),
        ("blk:colour=red", "blk has no option 'colour'; its options: file"),
        ("blk:file=/", "the disk's file /: Is a directory"),
        ("blk:file=/dev/null", "/dev/null is not a regular file"),
    ],
)
def test_a_device_that_cannot_be_made_is_wrong_usage(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_device(text)


def test_a_disk_file_of_partial_pages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x")
    with pytest.raises(UsageError, match="1 bytes"):
        make_device(f"blk:file={tmp_path}/disk")


def test_a_flush_succeeds_and_the_disk_has_its_identity(guest: Guest) -> None:
    assert request(guest, FLUSH, 0) == 0
    assert request(guest, GET_ID, 0, Buffer(DATA, 20, WRITE)) == 0
    assert guest.driver.read(DATA, 20) == b"dmaproof".ljust(20, b"\0")


@pytest.mark.parametrize(
    ("kind", "sector", "buffer", "status"),
    [
        (IN, (1 << 30) // 512, Buffer(DATA, 512, WRITE), 1),
        (IN, (1 << 30) // 512 - 1, Buffer(DATA, 1024, WRITE), 1),
        (OUT, (1 << 64) - 1, Buffer(DATA, 512), 1),
        (IN, 0, Buffer(DATA, 100, WRITE), 1),
        (99, 0, Buffer(DATA, 512, WRITE), 2),
    ],
)
def test_an_impossible_request_gets_an_error_status(
    guest: Guest, kind: int, sector: int, buffer: Buffer, status: int
) -> None:
    before = guest.driver.read(DATA, 512)
    assert request(guest, kind, sector, buffer) == status
    assert guest.driver.read(DATA, 512) == before


def test_config_space_has_capacity_and_queues(guest: Guest) -> None:
    space = struct.pack("<III", 0, 60, 0) + bytes(60)
    answer = guest.front_end.ask(Request.GET_CONFIG, space)[12:]
    assert int.from_bytes(answer[:8], "little") == (1 << 30) // 512
    assert int.from_bytes(answer[34:36], "little") == 2


def config_at(guest: Guest, offset: int, length: int, flags: int = 0) -> bytes:
    """Return the whole payload of the answer to GET_CONFIG."""
    space = struct.pack("<III", offset, length, flags) + bytes(length)
    return guest.front_end.ask(Request.GET_CONFIG, space)


def test_any_part_of_the_256_bytes_of_config_space_is_answered(guest: Guest) -> None:
    whole = Blk(1 << 30, queues=2).config().ljust(256, b"\0")
    for offset, length in ((0, 256), (16, 60), (255, 1), (30, 0)):
        answer = config_at(guest, offset, length)
        assert answer[:12] == struct.pack("<III", offset, length, 0)
        assert answer[12:] == whole[offset : offset + length]


def test_flags_of_a_config_access_are_returned_unchanged(guest: Guest) -> None:
    assert config_at(guest, 0, 4, 0xFFFF_FFFF)[8:12] == b"\xff" * 4


def test_protocol_features_and_queues_are_reported(guest: Guest) -> None:
    answer = guest.front_end.ask(Request.GET_PROTOCOL_FEATURES)
    assert answer == encode_u64(PROTOCOL_FEATURES)
    assert guest.front_end.ask(Request.GET_QUEUE_NUM) == encode_u64(2)


@pytest.mark.parametrize("queue_size", [1, 32768])
def test_an_inflight_file_fits_rings_of_every_size(guest: Guest, queue_size: int) -> None:
    guest.front_end.track_inflight(2, queue_size)
    size, offset, queues, reported_size = struct.unpack("<QQHH4x", guest.front_end.inflight_reply)
    assert (offset, queues, reported_size) == (0, 2, queue_size)
    assert size >= 2 * region_bytes(queue_size)


def test_the_answer_to_a_stop_is_the_position_of_the_ring(guest: Guest) -> None:
    request(guest, FLUSH, 0)
    request(guest, FLUSH, 0)
    answer = guest.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    assert answer == struct.pack("<II", 0, 2)
    assert request(guest, FLUSH, 0) == 0xFF  # the ring has stopped


# The dirty log ----------------------------------------------------------------------------------


def test_the_log_receives_every_written_page_and_no_other(guest: Guest) -> None:
    request(guest, IN, 0, Buffer(DATA, PAGE, WRITE))
    start_logging(guest)
    assert request(guest, IN, 8, Buffer(DATA + PAGE - 1, 2 * 512, WRITE)) == 0
    guest.front_end.session.collector.harvest()
    data = DATA // PAGE
    expected = {data, data + 1, STATUS // PAGE, guest.driver.used // PAGE}
    assert dirty_pages(guest.log) == expected
    guest.front_end.session.collector.harvest()
    assert dirty_pages(guest.log) == set()


def test_the_last_pages_are_logged_before_the_ring_has_stopped(guest: Guest) -> None:
    start_logging(guest)
    request(guest, IN, 0, Buffer(DATA, PAGE, WRITE))
    assert dirty_pages(guest.log) == set()
    guest.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    assert DATA // PAGE in dirty_pages(guest.log)


def test_immediate_harvest_logs_each_write_at_once() -> None:
    for guest in start_guest(FrontEnd(immediate=True)):
        start_logging(guest)
        request(guest, IN, 0, Buffer(DATA, PAGE, WRITE))
        assert {DATA // PAGE, STATUS // PAGE} <= dirty_pages(guest.log)


def test_a_new_log_receives_only_the_writes_after_the_switch(guest: Guest) -> None:
    start_logging(guest)
    request(guest, IN, 0, Buffer(DATA, PAGE, WRITE))
    with ram_fd(2 * LOG_BYTES) as new_log:
        guest.front_end.set_log(new_log, LOG_BYTES, LOG_BYTES)
        assert DATA // PAGE in dirty_pages(guest.log)
        request(guest, IN, 0, Buffer(DATA + 7 * PAGE, PAGE, WRITE))
        guest.front_end.session.collector.harvest()
        assert dirty_pages(guest.log) == set()
        assert os.pread(new_log, LOG_BYTES, 0) == bytes(LOG_BYTES)
        os.pwrite(guest.log, os.pread(new_log, LOG_BYTES, LOG_BYTES), 0)
        assert DATA // PAGE + 7 in dirty_pages(guest.log)


def test_logging_can_stop_and_start_again(guest: Guest) -> None:
    start_logging(guest)
    guest.front_end.log_all(False)
    dirty_pages(guest.log)
    request(guest, IN, 0, Buffer(DATA, PAGE, WRITE))
    start_logging(guest)
    request(guest, IN, 0, Buffer(DATA + PAGE, PAGE, WRITE))
    guest.front_end.session.collector.harvest()
    found = dirty_pages(guest.log)
    assert DATA // PAGE + 1 in found
    assert DATA // PAGE not in found


def test_a_dropped_page_never_reaches_the_log() -> None:
    for guest in start_guest(FrontEnd(fault="drop-pages=0.5")):
        start_logging(guest)
        for _ in range(2):
            for index in range(40):
                request(guest, IN, 0, Buffer(HIGH + index * PAGE, PAGE, WRITE))
            guest.front_end.session.collector.harvest()
        logged = {page - HIGH // PAGE for page in dirty_pages(guest.log) if page >= HIGH // PAGE}
        assert logged < set(range(40))
        assert 5 < len(logged) < 35


def test_no_request_is_served_between_log_all_and_the_log(guest: Guest) -> None:
    guest.front_end.log_all(True)
    assert request(guest, IN, 0, Buffer(DATA, PAGE, WRITE)) == 0xFF
    guest.front_end.set_log(guest.log, LOG_BYTES)
    guest.front_end.set_ring_address(guest.driver, logged=True)
    guest.front_end.serve()
    guest.front_end.session.collector.harvest()
    assert guest.driver.read(STATUS, 1) == b"\0"
    assert DATA // PAGE in dirty_pages(guest.log)


# A back end that died and was restarted ---------------------------------------------------------


def restarted(guest: Guest, *, log: bool) -> Guest:
    """Return the guest with a new back end after the first one died, set up again by QEMU."""
    dead = guest.front_end
    front_end = FrontEnd()
    assert dead.inflight is not None
    front_end.inflight, front_end.inflight_reply = os.dup(dead.inflight), dead.inflight_reply
    front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
    front_end.log_all(log)
    front_end.track_inflight(2, 128)
    front_end.set_memory(guest.ram, (0, 64 * PAGE, 0), (HIGH, 64 * PAGE, 64 * PAGE))
    front_end.start_ring(guest.driver, base=guest.driver.used_index, logged=log)
    if log:
        front_end.set_log(guest.log, LOG_BYTES)
    return guest._replace(front_end=front_end)


@pytest.fixture
def tracked(guest: Guest) -> Guest:
    """A guest whose requests in flight are recorded."""
    guest.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    guest.front_end.track_inflight(2, 128)
    guest.front_end.start_ring(guest.driver)
    return guest


def test_the_restarted_back_end_completes_a_request_in_flight(
    tracked: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Blk, "process", die)
        with pytest.raises(KeyboardInterrupt):
            request(tracked, IN, 0, Buffer(DATA, PAGE, WRITE))
    assert tracked.driver.used_index == 0
    guest = restarted(tracked, log=False)
    guest.front_end.serve()
    assert guest.driver.used_index == 1
    assert guest.driver.read(STATUS, 1) == b"\0"
    assert os.eventfd_read(guest.front_end.call) >= 1
    guest.front_end.close()


def test_a_restarted_back_end_reports_all_pages_if_logging_was_on(tracked: Guest) -> None:
    start_logging(tracked)
    assert request(tracked, IN, 0, Buffer(DATA, PAGE, WRITE)) == 0
    assert dirty_pages(tracked.log) == set(), "the back end died before the next harvest"
    guest = restarted(tracked, log=True)
    high = range(HIGH // PAGE, HIGH // PAGE + 64)
    assert dirty_pages(guest.log) == {*range(64), *high}
    guest.front_end.close()


def test_a_restarted_back_end_without_a_log_reports_no_pages(tracked: Guest) -> None:
    guest = restarted(tracked, log=False)
    start_logging(guest)
    guest.front_end.session.collector.harvest()
    assert dirty_pages(guest.log) == set()
    guest.front_end.close()


def test_after_a_stop_a_restarted_back_end_reports_no_pages(tracked: Guest) -> None:
    start_logging(tracked)
    tracked.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    dirty_pages(tracked.log)
    guest = restarted(tracked, log=True)
    assert dirty_pages(guest.log) == set()
    guest.front_end.close()


def test_a_truncated_inflight_file_is_refused(tracked: Guest) -> None:
    assert tracked.front_end.inflight is not None
    os.ftruncate(tracked.front_end.inflight, 0)
    with pytest.raises(ProtocolError, match="in-flight file was truncated"):
        request(tracked, FLUSH, 0)


# Front ends that break the specification --------------------------------------------------------


def refused(front_end: FrontEnd, message: str, data: bytes, fds: tuple[int, ...] = ()) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ProtocolError, match=message):
        front_end.send_raw(data, fds)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<III", 999, 1, 0), "request 999"),
        (struct.pack("<III", 1, 2, 0), "expected version 1, got 2"),
        (struct.pack("<III", 1, 5, 0), "a reply"),
        (struct.pack("<III", 2, 1, 1 << 30), "at most 4096 bytes, got 1073741824"),
        (encode_request(Request.SET_FEATURES, b"1234"), "expected a payload of 8 bytes, got 4"),
        (encode_request(Request.SET_FEATURES, encode_u64(1 << 63)), "not offered"),
        (encode_request(Request.SET_PROTOCOL_FEATURES, encode_u64(1 << 63)), "not offered"),
        *(
            (encode_request(request, struct.pack("<II", 2, 8)), f"{request.name}: ring 2, but ")
            for request in (
                *(Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE),
                Request.GET_VRING_BASE,
            )
        ),
        *(
            (encode_request(request, encode_u64(2 | 1 << 8)), f"{request.name}: ring 2, but ")
            for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL)
        ),
        (
            encode_request(Request.SET_VRING_ADDR, struct.pack("<II4Q", 2, *[0] * 5)),
            "SET_VRING_ADDR: ring 2, but the device has only 2 rings",
        ),
        (
            encode_request(Request.SET_VRING_KICK, encode_u64(0)),
            "got 0 file descriptors, expected 1",
        ),
        (
            encode_request(Request.SET_VRING_KICK, encode_u64(1 << 8)),
            "polling of a ring was not offered",
        ),
        (encode_request(Request.SET_LOG_BASE, struct.pack("<QQ", 8, 0)), "0 file descriptors"),
        (encode_request(Request.SET_MEM_TABLE, struct.pack("<II", 9, 0)), "9 regions"),
        (encode_request(Request.GET_INFLIGHT_FD, inflight(queues=3)), "3 rings of 128"),
        (encode_request(Request.GET_INFLIGHT_FD, inflight(queue_size=0)), "2 rings of 0"),
        (encode_request(Request.GET_INFLIGHT_FD, inflight(queue_size=40000)), "rings of 40000"),
        (encode_request(Request.SET_INFLIGHT_FD, inflight()), "SET_INFLIGHT_FD: got 0"),
        (
            encode_request(Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + bytes(32)),
            "0 file desc",
        ),
        (encode_request(Request.GET_CONFIG, struct.pack("<III", 250, 60, 0) + bytes(60)), "250"),
        (
            encode_request(Request.GET_CONFIG, struct.pack("<III", 253, 4, 0) + bytes(4)),
            "offset 253",
        ),
        (
            encode_request(Request.GET_CONFIG, struct.pack("<III", (1 << 32) - 4, 4, 0) + bytes(4)),
            "4 bytes at offset 4294967292 exceed the 256 bytes",
        ),
        (encode_request(Request.GET_CONFIG, struct.pack("<III", 0, 60, 0)), "declares 60 bytes"),
    ],
)
def test_a_malformed_message_is_refused(guest: Guest, data: bytes, message: str) -> None:
    refused(guest.front_end, message, data)


def test_a_log_too_small_for_the_guest_is_refused(guest: Guest) -> None:
    payload = struct.pack("<QQ", LOG_BYTES - 8, 0)
    data = encode_request(Request.SET_LOG_BASE, payload)
    refused(guest.front_end, f"{LOG_BYTES - 8} bytes is too small", data, (guest.log,))


def test_a_log_longer_than_its_file_is_refused(guest: Guest) -> None:
    data = encode_request(Request.SET_LOG_BASE, struct.pack("<QQ", LOG_BYTES + 8, 0))
    refused(guest.front_end, "SET_LOG_BASE.*inside its file", data, (guest.log,))


def test_a_log_of_half_the_address_space_is_refused(guest: Guest) -> None:
    data = encode_request(Request.SET_LOG_BASE, struct.pack("<QQ", 1 << 63, 0))
    refused(guest.front_end, "SET_LOG_BASE.*inside its file", data, (guest.log,))


def test_memory_larger_than_the_log_covers_is_refused(guest: Guest) -> None:
    start_logging(guest)
    places = struct.pack("<II", 1, 0) + struct.pack("<QQQQ", HIGH * 2, 64 * PAGE, 0, 0)
    data = encode_request(Request.SET_MEM_TABLE, places)
    refused(guest.front_end, "SET_MEM_TABLE: a dirty log of", data, (guest.ram,))


def test_a_memory_region_longer_than_its_file_is_refused(guest: Guest) -> None:
    places = struct.pack("<II", 1, 0) + struct.pack("<QQQQ", 0, RAM_BYTES, 0, PAGE)
    data = encode_request(Request.SET_MEM_TABLE, places)
    refused(guest.front_end, "SET_MEM_TABLE: memory slot", data, (guest.ram,))


def test_a_ring_outside_every_slot_is_refused(guest: Guest) -> None:
    data = encode_request(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 16, 16, 16, 16))
    refused(guest.front_end, "SET_VRING_ADDR: HVA 0x10", data)


def test_a_ring_in_the_upper_half_of_the_address_space_is_refused(guest: Guest) -> None:
    data = encode_request(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, *[1 << 63] * 4))
    refused(guest.front_end, "SET_VRING_ADDR: HVA 0x8000000000000000", data)


def test_a_used_ring_that_is_logged_at_another_address_is_refused(guest: Guest) -> None:
    guest.driver.used += 4
    with pytest.raises(ProtocolError, match="but its log address is"):
        guest.front_end.send(
            Request.SET_VRING_ADDR,
            struct.pack(
                "<IIQQQQ",
                0,
                1,
                0x7F00_0000_0000 + guest.driver.descriptors,
                0x7F00_0000_0000 + guest.driver.used,
                0x7F00_0000_0000 + guest.driver.available,
                guest.driver.used - 4,
            ),
        )


@pytest.mark.parametrize("address", [64 * PAGE - 10, HIGH - PAGE, HIGH + 64 * PAGE - 1, 1 << 63])
def test_a_buffer_outside_every_slot_is_not_written(guest: Guest, address: int) -> None:
    guest.driver.write(64 * PAGE - 10, b"untouched!")
    with pytest.raises(MemoryAccessError, match="0x"):
        request(guest, IN, 0, Buffer(address, PAGE, WRITE))
    assert guest.driver.read(64 * PAGE - 10, 10) == b"untouched!"
    assert guest.driver.read(STATUS, 1) == b"\xff"


def test_a_request_without_room_for_its_status_is_refused(guest: Guest) -> None:
    driver = guest.driver
    driver.write(HEADER, struct.pack("<IIQ", IN, 0, 0))
    driver.describe([Buffer(HEADER, 16)])
    driver.publish(0)
    with pytest.raises(ProtocolError, match="status byte"):
        guest.front_end.serve()


def test_a_request_that_is_too_large_gets_an_io_error(guest: Guest) -> None:
    guest.driver.write(HEADER, struct.pack("<IIQ", IN, 0, 0))
    chain = DescriptorChain(
        0, 3, [Segment(HEADER, 16)], [Segment(DATA, 64 << 20), Segment(STATUS, 1)]
    )
    assert Blk(1 << 40).process(chain, guest.front_end.session.dma) == 1
    assert guest.driver.read(STATUS, 1) == b"\x01"


def test_a_message_in_pieces_is_answered_when_it_is_complete(guest: Guest) -> None:
    *first, last = encode_request(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    for byte in first:
        guest.front_end.send_raw(bytes([byte]))
    assert select.select([guest.front_end.socket], [], [], 0)[0] == []
    guest.front_end.send_raw(bytes([last]))
    answer = guest.front_end.socket.recv(HEADER_BYTES + 8)
    assert struct.unpack_from("<I", answer) == (Request.GET_VRING_BASE,)


def test_up_to_64_kib_of_unread_answers_are_kept() -> None:
    back_end_socket, front_end_socket = socket.socketpair()
    connection = Connection(back_end_socket)
    with contextlib.suppress(BlockingIOError):
        while True:
            back_end_socket.send(bytes(1 << 16))
    connection.send(bytes(1 << 16))
    assert connection.wants_to_write
    with pytest.raises(ProtocolError, match="does not read its answers: 65537 bytes are unread"):
        connection.send(b"x")
    connection.close()
    front_end_socket.close()


def test_delayed_answers_arrive_complete() -> None:
    back_end_socket, front_end_socket = socket.socketpair()
    back_end_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection, answers = Connection(back_end_socket), [os.urandom(20_000) for _ in range(3)]
    for answer in answers:
        connection.send(answer)
    arrived = b""
    while len(arrived) < 60_000:
        arrived += front_end_socket.recv(700)
        connection.flush()
    assert arrived == b"".join(answers)
    assert not connection.wants_to_write
    connection.close()
    front_end_socket.close()


def test_a_message_in_pieces_does_not_consume_bytes_of_the_next_one() -> None:
    back_end_socket, front_end_socket = socket.socketpair()
    connection = Connection(back_end_socket)
    message = encode_request(Request.SET_FEATURES, encode_u64(7))
    front_end_socket.sendall(message[:5])
    assert list(connection.receive()) == []
    front_end_socket.sendall(message[5:15])
    assert list(connection.receive()) == []
    front_end_socket.sendall(message[15:] + message)
    assert [message.payload for message in connection.receive()] == [encode_u64(7)] * 2
    connection.close()
    front_end_socket.close()


def test_a_message_carries_at_most_8_file_descriptors(guest: Guest) -> None:
    guest.front_end.send(Request.SET_OWNER, fds=[guest.log] * 8)
    back_end_socket, front_end_socket = socket.socketpair()
    connection = Connection(back_end_socket)
    socket.send_fds(front_end_socket, [encode_request(Request.SET_OWNER)], [guest.log] * 9)
    with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
        list(connection.receive())
    connection.close()
    front_end_socket.close()


def test_file_descriptors_of_an_incomplete_message_are_closed(guest: Guest) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    back_end_socket, front_end_socket = socket.socketpair()
    connection = Connection(back_end_socket)
    socket.send_fds(front_end_socket, [encode_request(Request.SET_LOG_FD)[:4]], [guest.log])
    assert list(connection.receive()) == []
    connection.close()
    front_end_socket.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_front_end_that_disconnects_ends_the_session(guest: Guest) -> None:
    guest.front_end.socket.close()
    with pytest.raises(EOFError):
        guest.front_end.session.receive()
