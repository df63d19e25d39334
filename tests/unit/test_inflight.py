"""The bytes of an in-flight region as the specification lays them out, and their limits.

Another program may have written the region or may read it next ("Inflight I/O tracking").
"""

from __future__ import annotations

import contextlib
import struct
from typing import Any
from unittest import mock

import pytest

from dmaproof.errors import ProtocolError
from dmaproof.vhost_user.inflight import InflightVirtqueue, PackedRegion, region_bytes
from dmaproof.virtqueue import MAX_QUEUE_SIZE, PackedVirtqueue, RingAddresses, SplitVirtqueue
from qmp_tools.testbed.ring_driver import (
    AVAIL,
    NEXT,
    PAGE,
    WRITE,
    Buffer,
    PackedDriver,
    RingDriver,
    guest_memory,
    ram_fd,
)
from support.rings import DATA, RING, SIZE, dma_for, driver_of, queue_for

SPLIT_HEADER, SPLIT_ENTRY = struct.Struct("<QHHHH"), struct.Struct("<B5xHQ")
PACKED_HEADER, PACKED_ENTRY = struct.Struct("<QHHHHHHBB10x"), struct.Struct("<BxHHHQHHIQ")


class KilledError(Exception):
    """The process has been killed."""


def killed(*_: Any, **__: Any) -> None:
    raise KilledError


def empty_region(size: int = SIZE) -> memoryview:
    return memoryview(bytearray(region_bytes(size)))


def split_region(region: memoryview) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """Return the header, and (inflight, next, counter) of each entry."""
    end = SPLIT_HEADER.size + SIZE * SPLIT_ENTRY.size
    entries = SPLIT_ENTRY.iter_unpack(region[SPLIT_HEADER.size : end])
    return SPLIT_HEADER.unpack_from(region), [(entry[0], entry[1], entry[2]) for entry in entries]


def packed_region(region: memoryview) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the header, and the fields of each entry."""
    end = PACKED_HEADER.size + SIZE * PACKED_ENTRY.size
    return (
        PACKED_HEADER.unpack_from(region),
        list(PACKED_ENTRY.iter_unpack(region[PACKED_HEADER.size : end])),
    )


def pop_all(queue: InflightVirtqueue) -> list[int]:
    """Take every request, and return their numbers."""
    numbers = []
    while (chain := queue.pop()) is not None:
        numbers.append(chain.head)
    return numbers


def test_a_split_region_has_the_layout_of_the_specification() -> None:
    region = empty_region()
    with driver_of(RingDriver) as driver:
        queue = InflightVirtqueue(queue_for(driver), region)
        assert split_region(region)[0] == (0, 1, SIZE, 0, 0)
        heads = [driver.submit([Buffer(DATA, 1, WRITE)]) for _ in range(3)]
        chains = [queue.pop() for _ in heads]
        assert heads == [0, 1, 2]
        header, entries = split_region(region)
        assert header == (0, 1, SIZE, 0, 0)
        assert entries[:4] == [(1, 0, 0), (1, 0, 1), (1, 0, 2), (0, 0, 0)]
        for number in (1, 2):  # each batch links to the previous one
            chain = chains[number]
            assert chain is not None
            queue.push(chain, 1)
        header, entries = split_region(region)
        assert header == (0, 1, SIZE, 2, 2)
        assert entries[:4] == [(1, 0, 0), (0, 0, 1), (0, 1, 2), (0, 0, 0)]

        successor = InflightVirtqueue(queue_for(driver, base=2), region)
        assert pop_all(successor) == [0]
        driver.collect()
        head = driver.submit([Buffer(DATA, 1, WRITE)])
        assert pop_all(successor) == [head]
        assert split_region(region)[1][head] == (1, 0, 1), "the counter continues"


def test_the_counter_begins_at_0_without_requests_in_flight() -> None:
    region = empty_region()
    with driver_of(RingDriver) as driver:
        InflightVirtqueue(queue_for(driver), region)
        successor = InflightVirtqueue(queue_for(driver), region)
        driver.submit([Buffer(DATA, 1, WRITE)])
        assert pop_all(successor) == [0]
        assert split_region(region)[1][0] == (1, 0, 0)


def test_a_packed_region_has_the_layout_of_the_specification() -> None:
    region = empty_region()
    with driver_of(PackedDriver) as driver:
        queue = InflightVirtqueue(queue_for(driver), region)
        header, entries = packed_region(region)
        assert header == (0, 1, SIZE, 0, 0, 0, 0, 1, 1)
        assert entries == [(0, number + 1, *[0] * 7) for number in range(SIZE)]
        driver.submit([Buffer(DATA, 1), Buffer(DATA + 16, 2, WRITE)])
        driver.submit([Buffer(DATA + 32, 3, WRITE)])
        chains = [queue.pop(), queue.pop()]
        header, entries = packed_region(region)
        assert header == (0, 1, SIZE, 3, 3, 0, 0, 1, 1)
        assert entries[:4] == [
            (1, 1, 1, 2, 0, 0xBAD, AVAIL | NEXT, 1, DATA),
            (0, 2, 0, 0, 0, 0, AVAIL | WRITE, 2, DATA + 16),
            (1, 3, 2, 1, 1, 1, AVAIL | WRITE, 3, DATA + 32),
            (0, 4, *[0] * 7),
        ]
        assert chains[1] is not None
        queue.push(chains[1], 1)
        header, entries = packed_region(region)
        assert header == (0, 1, SIZE, 2, 2, 1, 1, 1, 1)
        assert [entry[0] for entry in entries] == [1, *[0] * 7]

        successor = InflightVirtqueue(queue_for(driver), region)
        assert pop_all(successor) == [0]
        driver.collect()
        driver.submit([Buffer(DATA, 1, WRITE)])
        assert len(pop_all(successor)) == 1
        assert packed_region(region)[1][2][:5] == (1, 3, 2, 1, 1), "the counter continues"


def test_a_region_is_unused_until_all_of_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    region = empty_region()
    with driver_of(PackedDriver) as driver:
        with monkeypatch.context() as patch, contextlib.suppress(KilledError):
            patch.setattr(struct, "pack_into", killed)  # killed while it links the entries
            InflightVirtqueue(queue_for(driver), region)
        assert region[8:10] == bytes(2)


# A request that takes the whole packed ring inverts the wrap counter and keeps the index.


def serve_and_be_killed(driver: PackedDriver, region: memoryview, owner: type, method: str) -> int:
    """Take a request of all descriptors, and be killed in `method` while returning it.

    Returns the request's number.
    """
    queue = InflightVirtqueue(queue_for(driver), region)
    number = driver.submit([Buffer(DATA, 1, WRITE)] * SIZE)
    chain = queue.pop()
    assert chain is not None
    with mock.patch.object(owner, method, killed), pytest.raises(KilledError):
        queue.push(chain, 1)
    return number


def test_a_request_of_all_descriptors_is_repeated_if_it_was_not_returned() -> None:
    region = empty_region()
    with driver_of(PackedDriver) as driver:
        number = serve_and_be_killed(driver, region, PackedVirtqueue, "push")
        successor = InflightVirtqueue(queue_for(driver), region)
        chain = successor.pop()
        assert chain is not None
        assert chain.writable == [(DATA, 1)] * SIZE
        successor.push(chain, 2)
        assert driver.collect() == [(number, 2)]


def test_a_request_of_all_descriptors_is_not_repeated_if_it_was_returned() -> None:
    region = empty_region()
    with driver_of(PackedDriver) as driver:
        number = serve_and_be_killed(driver, region, PackedRegion, "given_back")
        assert driver.collect() == [(number, 1)]
        successor = InflightVirtqueue(queue_for(driver), region)
        assert successor.pop() is None
        assert successor.base == 0, "index 0 of the second round, for both sides"


# Limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [SplitVirtqueue, PackedVirtqueue])
def test_the_largest_ring_is_recorded(form: type[SplitVirtqueue] | type[PackedVirtqueue]) -> None:
    region = empty_region(MAX_QUEUE_SIZE)
    end = 16 * MAX_QUEUE_SIZE
    addresses = RingAddresses(0, end, end + 32 * PAGE)
    with ram_fd(end + 128 * PAGE) as fd:
        dma = dma_for(guest_memory(fd, (0, end + 128 * PAGE, 0)))
        for _ in range(2):  # a new region, then the same region as found
            queue = InflightVirtqueue(form(dma, addresses, MAX_QUEUE_SIZE), region)
            assert struct.unpack_from("<HH", region, 8) == (1, MAX_QUEUE_SIZE)
            assert queue.pop() is None


def test_the_used_index_of_a_split_ring_wraps() -> None:
    region = empty_region()
    with driver_of(RingDriver) as plain:
        driver = RingDriver(plain.memory, RING, next_index=0xFFFE)
        driver.write(driver.used + 2, b"\xfe\xff")
        queue = InflightVirtqueue(queue_for(driver, base=0xFFFE), region)
        for expected in (0xFFFF, 0, 1):
            driver.describe([Buffer(DATA, 1, WRITE)])
            driver.publish(0)
            chain = queue.pop()
            assert chain is not None
            queue.push(chain, 1)
            assert split_region(region)[0] == (0, 1, SIZE, 0, expected)


@pytest.mark.parametrize("last_batch_head", [SIZE, 0xFFFF])
def test_a_last_batch_outside_a_split_ring_is_ignored(last_batch_head: int) -> None:
    region = empty_region()
    SPLIT_HEADER.pack_into(region, 0, 0, 1, SIZE, last_batch_head, 5)
    SPLIT_ENTRY.pack_into(region, SPLIT_HEADER.size, 1, 0, 0)
    with driver_of(RingDriver) as driver:
        driver.submit([Buffer(DATA, 1, WRITE)])
        assert pop_all(InflightVirtqueue(queue_for(driver), region)) == [0]


@pytest.mark.parametrize(("used", "old_used"), [(SIZE, 0), (0, SIZE), (0xFFFF, 0), (0, 0xFFFF)])
def test_a_used_index_outside_a_packed_ring_is_refused(used: int, old_used: int) -> None:
    region = empty_region()
    PACKED_HEADER.pack_into(region, 0, 0, 1, SIZE, 0, 0, used, old_used, 1, 1)
    with (
        driver_of(PackedDriver) as driver,
        pytest.raises(ProtocolError, match="the used index is outside the ring of 8"),
    ):
        InflightVirtqueue(queue_for(driver), region)
