"""In-flight regions with invalid content, which the back end must refuse."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from dmaproof.errors import ProtocolError
from dmaproof.vhost_user.features import F_RING_PACKED, PROTOCOL_FEATURES
from dmaproof.vhost_user.inflight import region_bytes
from dmaproof.vhost_user.messages import Request, encode_u64
from qmp_tools.testbed.ring_driver import (
    PAGE,
    WRITE,
    Buffer,
    PackedDriver,
    RingDriver,
    guest_memory,
    ram_fd,
)
from support.front_end import FEATURES, FrontEnd

RAM_BYTES = 32 * PAGE
RING, HEADER, STATUS, DATA = 2 * PAGE, 6 * PAGE, 7 * PAGE, 24 * PAGE
SIZE = 8
EXTENT = region_bytes(SIZE)
FREE_HEAD, OLD_FREE_HEAD = 12, 14
ENTRIES, ENTRY_BYTES = 32, 32


@pytest.fixture
def ram() -> Iterator[int]:
    with ram_fd(RAM_BYTES) as fd:
        yield fd


@pytest.fixture
def region() -> Iterator[int]:
    with ram_fd(EXTENT) as fd:
        yield fd


@pytest.fixture
def front_end(ram: int, region: int) -> Iterator[FrontEnd]:
    front_end = FrontEnd()
    front_end.send(Request.SET_FEATURES, encode_u64(FEATURES | F_RING_PACKED))
    front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
    front_end.set_memory(ram, (0, RAM_BYTES, 0))
    front_end.send(Request.SET_INFLIGHT_FD, described(), [region])
    yield front_end
    front_end.close()


def described() -> bytes:
    return struct.pack("<QQHH4x", EXTENT, 0, 1, SIZE)


def spoil(region: int, place: int, *words: int) -> None:
    os.pwrite(region, struct.pack(f"<{len(words)}H", *words), place)


def packed_ring(ram: int) -> PackedDriver:
    return PackedDriver(guest_memory(ram, (0, RAM_BYTES, 0)), RING, SIZE)


def write_inflight(region: int, *entries: tuple[int, int, int, int]) -> None:
    """Write entries (index, next, last, count) in flight, as a previous back end would."""
    spoil(region, 8, 1, SIZE)
    for index, following, last, count in entries:
        entry = struct.pack("<BxHHHQ", 1, following, last, count, index)
        os.pwrite(region, entry, ENTRIES + ENTRY_BYTES * index)
    spoil(region, FREE_HEAD, SIZE, SIZE)  # no entry is free


def request(driver: RingDriver | PackedDriver) -> None:
    driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    driver.submit([Buffer(HEADER, 16), Buffer(DATA, PAGE, WRITE), Buffer(STATUS, 1, WRITE)])


@pytest.mark.parametrize("files", [0, 2])
def test_an_inflight_message_needs_exactly_one_file(
    front_end: FrontEnd, region: int, files: int
) -> None:
    with pytest.raises(ProtocolError, match=f"SET_INFLIGHT_FD: got {files} file descriptors"):
        front_end.send(Request.SET_INFLIGHT_FD, described(), [region] * files)


@pytest.mark.parametrize("head", [SIZE + 1, 0xFFFF])
def test_a_list_that_leads_outside_the_region_is_refused(
    front_end: FrontEnd, ram: int, region: int, head: int
) -> None:
    driver = packed_ring(ram)
    front_end.start_ring(driver)
    request(driver)
    spoil(region, FREE_HEAD, head, head)
    with pytest.raises(ProtocolError, match="in-flight region has invalid content"):
        front_end.serve()


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(((0, 0, 0, 0),), id="a request of nothing"),
        pytest.param(((0, 1, 0, 5), (1, 2, 0, 5)), id="more than the ring holds"),
        pytest.param(((0, 0, 0, 0xFFFF), (1, 1, 0, 0xFFFF)), id="lists without an end"),
    ],
)
def test_requests_that_cannot_be_in_flight_are_refused(
    front_end: FrontEnd, ram: int, region: int, entries: tuple[tuple[int, int, int, int], ...]
) -> None:
    write_inflight(region, *entries)
    with pytest.raises(
        ProtocolError, match=r"in-flight region: the requests have .* at most 8 in all"
    ):
        front_end.start_ring(packed_ring(ram))


def test_a_truncated_region_is_refused(front_end: FrontEnd, ram: int, region: int) -> None:
    driver = packed_ring(ram)
    front_end.start_ring(driver)
    request(driver)
    os.ftruncate(region, 0)
    with pytest.raises(ProtocolError, match="in-flight file was truncated"):
        front_end.serve()
