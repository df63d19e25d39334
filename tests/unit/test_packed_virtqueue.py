"""A packed ring: valid requests are served exactly, invalid ones are refused without a write."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from dmaproof.errors import MemoryAccessError, ProtocolError
from dmaproof.journal import Journal, WriteKind
from dmaproof.virtqueue import DescriptorChain, Segment
from qmp_tools.testbed.ring_driver import (
    AVAIL,
    INDIRECT,
    NEXT,
    PAGE,
    USED,
    WRITE,
    Buffer,
    PackedDriver,
)
from support.rings import DATA, RAM_BYTES, SIZE, TABLES, Marks, dma_for, driver_of, queue_for


@pytest.fixture
def driver() -> Iterator[PackedDriver]:
    with driver_of(PackedDriver) as driver:
        yield driver


def test_an_empty_ring_has_no_request(driver: PackedDriver) -> None:
    assert queue_for(driver).pop() is None


def test_a_list_has_its_buffer_id_in_the_last_descriptor(driver: PackedDriver) -> None:
    expected = driver.submit(
        [Buffer(DATA, 16), Buffer(DATA + PAGE, 512, WRITE), Buffer(DATA, 1, WRITE)]
    )
    queue = queue_for(driver)
    chain = queue.pop()
    assert chain == DescriptorChain(
        expected, 3, [Segment(DATA, 16)], [Segment(DATA + PAGE, 512), Segment(DATA, 1)]
    )
    assert queue.pop() is None


def test_requests_can_be_returned_in_any_order(driver: PackedDriver) -> None:
    first = driver.submit([Buffer(DATA, 1, WRITE)] * 3)
    second = driver.submit([Buffer(DATA, 1, WRITE)])
    queue = queue_for(driver)
    chains = [queue.pop(), queue.pop()]
    for chain, written in zip(reversed(chains), (7, 0), strict=True):
        assert chain is not None
        queue.push(chain, written)
    assert driver.collect() == [(second, 7), (first, 0)]


def test_a_list_wraps_around_the_ring(driver: PackedDriver) -> None:
    queue = queue_for(driver)
    for number in range(11):  # 3 does not divide 8, so every alignment occurs
        expected = driver.submit([Buffer(DATA + number, 1, WRITE)] * 3)
        chain = queue.pop()
        assert chain is not None
        assert chain.writable == [Segment(DATA + number, 1)] * 3
        queue.push(chain, number)
        assert driver.collect() == [(expected, number)]
        done = 3 * (number + 1)
        half = done % 8 | (0x8000 if done // 8 % 2 == 0 else 0)
        assert queue.base == half | half << 16


def test_a_full_ring_is_served_and_nothing_more(driver: PackedDriver) -> None:
    queue = queue_for(driver)
    for _ in range(3):
        expected = [driver.submit([Buffer(DATA, 1, WRITE)]) for _ in range(SIZE)]
        chains = [queue.pop() for _ in range(SIZE)]
        assert queue.pop() is None
        for chain in chains:
            assert chain is not None
            queue.push(chain, 1)
        assert driver.collect() == [(number, 1) for number in expected]


def test_a_ring_continues_at_its_base(driver: PackedDriver) -> None:
    queue = queue_for(driver)
    for _ in range(3):
        driver.submit([Buffer(DATA, 1, WRITE)] * 3)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 1)
        driver.collect()
    expected = [driver.submit([Buffer(DATA, 1, WRITE)] * 3) for _ in range(2)]
    taken = queue.pop()  # but not returned, so the halves of the base differ
    assert taken is not None
    successor = queue_for(driver, base=queue.base)
    successor.push(taken, 5)
    chain = successor.pop()
    assert chain is not None
    assert chain.head == expected[1]
    successor.push(chain, 6)
    assert driver.collect() == [(expected[0], 5), (expected[1], 6)]


def test_an_indirect_table_takes_one_descriptor(driver: PackedDriver) -> None:
    buffers = [Buffer(DATA + 16 * i, 16, WRITE) for i in range(3 * SIZE)]
    driver.submit(buffers, TABLES)
    chain = queue_for(driver).pop()
    assert chain is not None
    assert chain.descriptors == 1
    assert [segment.iova for segment in chain.writable] == [buffer.address for buffer in buffers]


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        pytest.param([Buffer(DATA, 1, NEXT)] * SIZE, "within the ring of 8", id="endless"),
        pytest.param(
            [Buffer(DATA, 1, WRITE | NEXT), Buffer(DATA, 1)],
            "readable descriptor after",
            id="readable behind writable",
        ),
        pytest.param(
            [Buffer(TABLES, 24, INDIRECT)],
            "table of request 0 has 24 bytes",
            id="table with half an entry",
        ),
        pytest.param([Buffer(TABLES, 0, INDIRECT)], "0 bytes", id="table without entries"),
        pytest.param(
            [Buffer(TABLES, 16, INDIRECT | NEXT), Buffer(DATA, 1)], "chained", id="table and more"
        ),
        pytest.param(
            [Buffer(DATA, 1, NEXT), Buffer(TABLES, 16, INDIRECT)], "chained", id="more and table"
        ),
        pytest.param([Buffer(TABLES + 16, 16, INDIRECT)], "nested", id="table in a table"),
    ],
)
def test_a_broken_list_is_refused(
    driver: PackedDriver, buffers: list[Buffer], message: str
) -> None:
    driver.write(TABLES, struct.pack("<QIHH", DATA, 16, 0, 0))
    driver.write(TABLES + 16, struct.pack("<QIHH", TABLES, 16, 0, INDIRECT))
    for index, buffer in enumerate(buffers):
        driver.put(index, buffer, 0, buffer.flags | AVAIL)
    queue = queue_for(driver)
    for _ in range(2):  # the device does not skip the request
        with pytest.raises(ProtocolError, match=message):
            queue.pop()


def test_a_table_that_was_not_negotiated_is_refused(driver: PackedDriver) -> None:
    driver.submit([Buffer(DATA, 1)], TABLES)
    with pytest.raises(ProtocolError, match="not negotiated"):
        queue_for(driver, indirect=False).pop()


def test_a_table_outside_ram_is_refused(driver: PackedDriver) -> None:
    driver.put(0, Buffer(RAM_BYTES - 16, 32), 0, INDIRECT | AVAIL)
    with pytest.raises(MemoryAccessError):
        queue_for(driver).pop()


@pytest.mark.parametrize("flags", [0, USED, AVAIL | USED])
def test_descriptors_of_the_driver_are_left_alone(driver: PackedDriver, flags: int) -> None:
    driver.put(0, Buffer(DATA, 1), 0, flags)
    assert queue_for(driver).pop() is None


@pytest.mark.parametrize("size", [0, 32769])
def test_an_impossible_size_is_refused(driver: PackedDriver, size: int) -> None:
    driver.size = size
    with pytest.raises(ProtocolError, match="queue size"):
        queue_for(driver)


@pytest.mark.parametrize("base", [0x8000_8008, 0x8008_8000, 0x7FFF, 1 << 40])
def test_a_base_outside_the_ring_is_refused(driver: PackedDriver, base: int) -> None:
    with pytest.raises(ProtocolError, match="outside the packed ring of 8"):
        queue_for(driver, base=base)


def test_a_part_outside_ram_is_refused(driver: PackedDriver) -> None:
    driver.used = RAM_BYTES
    with pytest.raises(MemoryAccessError):
        queue_for(driver)


def test_every_write_to_the_ring_is_tracked(driver: PackedDriver) -> None:
    marks, journal = Marks(), Journal()
    journal.start()
    driver.event_index = True
    queue = queue_for(driver, dma_for(driver.memory, marks=marks, journal=journal))
    queue.push(DescriptorChain(5, 2), 7)
    queue.push(DescriptorChain(6, 1), 0)
    ring = driver.descriptors
    assert marks.ranges == [(ring + 8, 6), (ring + 14, 2), (ring + 40, 6), (ring + 46, 2)]
    assert driver.read(ring + 8, 8) == struct.pack("<IHH", 7, 5, AVAIL | USED | WRITE)
    assert driver.read(ring + 40, 8) == struct.pack("<IHH", 0, 6, AVAIL | USED)
    del marks.ranges[:]
    queue.ask_for_kick()
    queue.ask_for_kick()  # nothing has changed, so nothing is written
    assert marks.ranges == [(driver.used, 4)]
    assert set(journal.records()["kind"]) == {WriteKind.USED_RING}


def test_buffer_ids_and_lengths_are_unsigned(driver: PackedDriver) -> None:
    queue_for(driver).push(DescriptorChain(0xFFFF, 1), 0xFFFF_FFFF)
    assert driver.read(driver.descriptors + 8, 6) == b"\xff" * 6


def test_the_driver_can_switch_interrupts_off(driver: PackedDriver) -> None:
    queue = queue_for(driver)
    assert not queue.wants_interrupt()
    queue.push(DescriptorChain(0, 1), 0)
    assert queue.wants_interrupt()
    assert not queue.wants_interrupt()
    driver.interrupt(wanted=False)
    queue.push(DescriptorChain(0, 1), 0)
    assert not queue.wants_interrupt()


@pytest.mark.parametrize(("event_index", "flags"), [(True, 0), (False, 2)])
def test_the_event_descriptor_counts_only_if_negotiated_and_requested(
    driver: PackedDriver,
    event_index: bool,
    flags: int,
) -> None:
    driver.event_index = event_index
    queue = queue_for(driver)
    driver.write(driver.available, struct.pack("<HH", 5 | 0x8000, flags))
    queue.push(DescriptorChain(0, 1), 0)  # the event descriptor is a later one
    assert queue.wants_interrupt()


@pytest.mark.parametrize("start", range(2 * SIZE))
@pytest.mark.parametrize(("descriptor", "wanted"), [(0, True), (3, True), (4, False), (8, False)])
def test_the_driver_is_interrupted_when_the_event_descriptor_is_used(
    driver: PackedDriver, start: int, descriptor: int, wanted: bool
) -> None:
    half = start % SIZE | (0x8000 if start < SIZE else 0)
    driver.event_index = True
    queue = queue_for(driver, base=half | half << 16)
    awaited = (start + descriptor) % (2 * SIZE)
    offset = awaited % SIZE | (0x8000 if awaited < SIZE else 0)
    driver.write(driver.available, struct.pack("<HH", offset, 2))
    queue.push(DescriptorChain(0, 3), 0)
    queue.push(DescriptorChain(1, 1), 0)
    assert queue.wants_interrupt() is wanted
    assert not queue.wants_interrupt()


def test_a_request_that_arrived_while_kicks_were_off_is_noticed(driver: PackedDriver) -> None:
    driver.event_index = True
    queue = queue_for(driver)
    assert not queue.ask_for_kick()
    assert driver.read(driver.used, 4) == struct.pack("<HH", 0x8000, 2)
    driver.submit([Buffer(DATA, 1)] * 3)
    assert queue.ask_for_kick()
    assert queue.pop() is not None
    assert not queue.ask_for_kick()
    assert driver.read(driver.used, 4) == struct.pack("<HH", 0x8003, 2)


def test_a_previous_back_ends_event_suppression_is_overwritten(driver: PackedDriver) -> None:
    driver.write(driver.used, struct.pack("<HH", 0, 1))  # "never kick"
    queue_for(driver).ask_for_kick()
    assert driver.read(driver.used, 4) == bytes(4)
