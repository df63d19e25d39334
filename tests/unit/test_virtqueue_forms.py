"""Common behaviour of both forms of rings: limits, negotiation, and the IOMMU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from dmaproof.errors import ProtocolError
from dmaproof.guest_memory import IovaMap
from dmaproof.journal import Journal
from dmaproof.virtqueue import (
    MAX_QUEUE_SIZE,
    PackedVirtqueue,
    RingAddresses,
    Segment,
    SplitVirtqueue,
)
from dmaproof.virtqueue.chain import read_indirect_table
from qmp_tools.testbed.ring_driver import (
    PAGE,
    WRITE,
    Buffer,
    Driver,
    PackedDriver,
    guest_memory,
    ram_fd,
)
from support.rings import DATA, DRIVERS, TABLES, Marks, dma_for, driver_of, queue_for, scatter

LARGEST = 16 * MAX_QUEUE_SIZE
"""Bytes of the largest descriptor table."""


@pytest.fixture(params=sorted(DRIVERS))
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with driver_of(DRIVERS[request.param]) as driver:
        yield driver


def plain_queue(driver: Driver) -> SplitVirtqueue | PackedVirtqueue:
    """Return a queue at its initial position, without negotiated features."""
    make_queue = PackedVirtqueue if isinstance(driver, PackedDriver) else SplitVirtqueue
    addresses = RingAddresses(driver.descriptors, driver.available, driver.used)
    return make_queue(dma_for(driver.memory), addresses, driver.size)


def test_a_queue_begins_at_the_initial_position(driver: Driver) -> None:
    queue = plain_queue(driver)
    assert queue.base == driver.base
    assert queue.pop() is None
    number = driver.submit([Buffer(DATA, 1, WRITE)])
    chain = queue.pop()
    assert chain is not None
    assert chain.head == number


@pytest.mark.parametrize("form", sorted(DRIVERS))
@pytest.mark.parametrize("start", [0, 16, PAGE - 16])
def test_a_ring_of_many_scattered_pages_is_served(form: str, start: int) -> None:
    # QEMU 10.0 gives rings 1,024 entries, so behind an IOMMU their 16 KiB are on several pages.
    marks, journal, size = Marks(), Journal(), 1024
    journal.start()
    with driver_of(DRIVERS[form], size, base=2 * PAGE + start) as driver:
        scatter(driver)
        assert len(driver.pages) >= 5
        queue = queue_for(
            driver, dma_for(driver.memory, bus=driver.bus, marks=marks, journal=journal)
        )
        for burst in (700, 1000, 800):  # each one ends at another place of the ring
            numbers = [driver.submit([Buffer(DATA + at, 1, WRITE)]) for at in range(burst)]
            for at, number in enumerate(numbers):
                chain = queue.pop()
                assert chain is not None
                assert (chain.head, chain.writable) == (number, [Segment(DATA + at, 1)])
                queue.push(chain, at)
            assert driver.collect() == [(number, at) for at, number in enumerate(numbers)]
        written = [piece for range_ in marks.ranges for piece in driver.bus.translate(*range_)]
    assert journal.records()[["gpa", "length"]].tolist() == written
    if form == "split":  # an element of the used ring, 4 + 8 * n bytes into it, crosses each page
        assert len(written) > len(marks.ranges)
    assert len({gpa // PAGE for gpa, _ in written}) >= 3


def test_features_that_were_not_negotiated_are_not_used(driver: Driver) -> None:
    queue = plain_queue(driver)
    driver.submit([Buffer(DATA, 1)])
    assert queue.pop() is not None
    before = driver.read(driver.used, driver.used_bytes)
    assert not queue.ask_for_kick()
    assert driver.read(driver.used, driver.used_bytes) == before, "no event index is written"
    driver.submit([Buffer(DATA, 1)], TABLES)
    with pytest.raises(ProtocolError, match="not negotiated"):
        queue.pop()


@pytest.mark.parametrize(
    ("form", "part", "name", "alignment"),
    [
        ("split", "descriptors", "descriptor table", 16),
        ("split", "available", "available ring", 2),
        ("split", "used", "used ring", 4),
        ("packed", "descriptors", "descriptor ring", 16),
        ("packed", "available", "driver's event suppression structure", 4),
        ("packed", "used", "device's event suppression structure", 4),
    ],
)
def test_a_misaligned_part_is_refused_by_name(
    form: str, part: str, name: str, alignment: int
) -> None:
    with driver_of(DRIVERS[form]) as driver:
        address = getattr(driver, part) + alignment // 2
        setattr(driver, part, address)
        expected = f"^{name} at {address:#x} is not aligned to {alignment} bytes$"
        with pytest.raises(ProtocolError, match=expected):
            queue_for(driver)


class AskingBus(IovaMap):
    """Records the ranges that a request requires."""

    asked: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]

    def require(
        self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]
    ) -> None:
        self.asked.append((list(readable), list(writable)))


@pytest.mark.parametrize("table", [None, TABLES])
def test_a_request_is_taken_only_when_all_of_its_addresses_are_known(
    driver: Driver, table: int | None
) -> None:
    bus = AskingBus(IovaMap.identity(driver.memory).mappings)
    bus.asked = []
    driver.submit([Buffer(DATA, 16), Buffer(DATA + PAGE, 512, WRITE)], table)
    assert queue_for(driver, dma_for(driver.memory, bus=bus)).pop() is not None
    buffers = ([(DATA, 16)], [(DATA + PAGE, 512)])
    assert bus.asked == [buffers] if table is None else [([(table, 32)], []), buffers]


@pytest.mark.parametrize("form", [SplitVirtqueue, PackedVirtqueue])
def test_the_largest_ring_can_be_served(
    form: type[SplitVirtqueue] | type[PackedVirtqueue],
) -> None:
    with ram_fd(2 * LARGEST) as fd:
        dma = dma_for(guest_memory(fd, (0, 2 * LARGEST, 0)))
        addresses = RingAddresses(0, LARGEST, LARGEST + 32 * PAGE)
        assert form(dma, addresses, MAX_QUEUE_SIZE).pop() is None


def test_an_indirect_table_is_at_most_as_long_as_the_largest_ring() -> None:
    with ram_fd(2 * LARGEST) as fd:
        dma = dma_for(guest_memory(fd, (0, 2 * LARGEST, 0)))
        assert len(read_indirect_table(dma, 0, 0, LARGEST)) == LARGEST
        with pytest.raises(ProtocolError, match="of 1 to 32768 descriptors"):
            read_indirect_table(dma, 0, 0, LARGEST + 16)
