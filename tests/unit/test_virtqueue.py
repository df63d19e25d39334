"""A split ring: valid requests are served exactly, invalid ones are refused without a write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmaproof.errors import MemoryAccessError, ProtocolError
from dmaproof.virtqueue import DescriptorChain, Segment
from qmp_tools.testbed.ring_driver import INDIRECT, NEXT, PAGE, WRITE, Buffer, RingDriver
from support.rings import DATA, RAM_BYTES, RING, TABLES, Marks, dma_for, driver_of, queue_for


@pytest.fixture
def driver() -> Iterator[RingDriver]:
    with driver_of(RingDriver) as driver:
        yield driver


def test_an_empty_ring_has_no_request(driver: RingDriver) -> None:
    assert queue_for(driver).pop() is None


def test_a_chain_has_readable_then_writable_buffers(driver: RingDriver) -> None:
    driver.describe(
        driver.chain([Buffer(DATA, 16), Buffer(DATA + PAGE, 512, WRITE), Buffer(DATA, 1, WRITE)])
    )
    driver.publish(0)
    chain = queue_for(driver).pop()
    assert chain == DescriptorChain(
        0, 1, [Segment(DATA, 16)], [Segment(DATA + PAGE, 512), Segment(DATA, 1)]
    )


def test_a_full_ring_is_served_and_nothing_more(driver: RingDriver) -> None:
    driver.describe([Buffer(DATA, 1, WRITE)] * driver.size)
    driver.publish(*range(driver.size))
    queue = queue_for(driver)
    chains = [queue.pop() for _ in range(driver.size)]
    assert [chain.head for chain in chains if chain] == list(range(driver.size))
    assert queue.pop() is None


def test_an_indirect_table_may_be_longer_than_the_ring(driver: RingDriver) -> None:
    buffers = driver.chain([Buffer(DATA + 16 * i, 16, WRITE) for i in range(3 * driver.size)])
    driver.describe(buffers, table=TABLES)
    driver.describe([Buffer(TABLES, 16 * len(buffers), INDIRECT)])
    driver.publish(0)
    chain = queue_for(driver).pop()
    assert chain is not None
    assert [segment.iova for segment in chain.writable] == [b.address for b in buffers]


def test_the_ring_wraps_and_the_index_too(driver: RingDriver) -> None:
    driver = RingDriver(driver.memory, RING, next_index=0xFFFE)
    driver.describe([Buffer(DATA, 1, WRITE)])
    driver.write(driver.used + 2, b"\xfe\xff")
    queue = queue_for(driver, base=0xFFFE)
    for expected in (0xFFFF, 0, 1):
        driver.publish(0)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 1)
        assert driver.used_index == expected
        assert driver.used_element(expected - 1) == (0, 1)
    assert queue.base == 1


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        pytest.param([Buffer(DATA, 1, NEXT, 0)], "loops", id="loop of one"),
        pytest.param(
            [Buffer(DATA, 1, NEXT, 1), Buffer(DATA, 1, NEXT, 0)], "loops", id="loop of two"
        ),
        pytest.param([Buffer(DATA, 1, NEXT, 8)], "the table of 8", id="next outside the table"),
        pytest.param(
            [Buffer(DATA, 1, WRITE | NEXT, 1), Buffer(DATA, 1)],
            "readable descriptor after",
            id="readable behind writable",
        ),
        pytest.param(
            [Buffer(TABLES, 24, INDIRECT)],
            "table of request 0 has 24 bytes",
            id="table with half an entry",
        ),
        pytest.param([Buffer(TABLES, 0, INDIRECT)], "0 bytes", id="table without entries"),
        pytest.param([Buffer(TABLES, 16, INDIRECT | NEXT, 1)], "chained", id="table and more"),
    ],
)
def test_a_broken_chain_is_refused(driver: RingDriver, buffers: list[Buffer], message: str) -> None:
    driver.describe(buffers)
    driver.publish(0)
    with pytest.raises(ProtocolError, match=message):
        queue_for(driver).pop()


def test_the_write_flag_of_a_table_is_ignored(driver: RingDriver) -> None:
    # Section 2.7.5.3.2.
    driver.describe([Buffer(DATA, 16)], table=TABLES)
    driver.describe([Buffer(TABLES, 16, INDIRECT | WRITE)])
    driver.publish(0)
    chain = queue_for(driver).pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == ([Segment(DATA, 16)], [])


def test_a_nested_table_is_refused(driver: RingDriver) -> None:
    driver.describe([Buffer(TABLES, 16, INDIRECT)], table=TABLES)
    driver.describe([Buffer(TABLES, 16, INDIRECT)])
    driver.publish(0)
    with pytest.raises(ProtocolError, match="nested"):
        queue_for(driver).pop()


def test_a_loop_inside_a_table_is_refused(driver: RingDriver) -> None:
    driver.describe([Buffer(DATA, 1, NEXT, 1), Buffer(DATA, 1, NEXT, 0)], table=TABLES)
    driver.describe([Buffer(TABLES, 32, INDIRECT)])
    driver.publish(0)
    with pytest.raises(ProtocolError, match="loops"):
        queue_for(driver).pop()


def test_a_descriptor_outside_its_table_is_refused(driver: RingDriver) -> None:
    driver.describe([Buffer(DATA, 1, NEXT, 2)], table=TABLES)
    driver.describe([Buffer(TABLES, 32, INDIRECT)])
    driver.publish(0)
    with pytest.raises(ProtocolError, match=r"descriptor 2 of request 0 is outside .* 2$"):
        queue_for(driver).pop()


def test_a_table_that_was_not_negotiated_is_refused(driver: RingDriver) -> None:
    driver.describe([Buffer(DATA, 1)], table=TABLES)
    driver.describe([Buffer(TABLES, 16, INDIRECT)])
    driver.publish(0)
    with pytest.raises(ProtocolError, match="not negotiated"):
        queue_for(driver, indirect=False).pop()


def test_a_table_outside_ram_is_refused(driver: RingDriver) -> None:
    driver.describe([Buffer(RAM_BYTES - 16, 32, INDIRECT)])
    driver.publish(0)
    with pytest.raises(MemoryAccessError):
        queue_for(driver).pop()


def test_a_head_outside_the_table_is_refused(driver: RingDriver) -> None:
    driver.publish(driver.size)
    with pytest.raises(ProtocolError, match="the table of 8"):
        queue_for(driver).pop()


def test_an_index_further_ahead_than_the_ring_is_refused(driver: RingDriver) -> None:
    driver.publish(*[0] * 9)
    with pytest.raises(ProtocolError, match="9 ahead"):
        queue_for(driver).pop()


@pytest.mark.parametrize("size", [0, 3, 32769, 65536])
def test_an_impossible_size_is_refused(driver: RingDriver, size: int) -> None:
    driver.size = size
    with pytest.raises(ProtocolError, match="queue size"):
        queue_for(driver)


def test_a_part_outside_ram_is_refused(driver: RingDriver) -> None:
    driver.used = RAM_BYTES - 4
    with pytest.raises(MemoryAccessError):
        queue_for(driver)


def test_a_ring_may_end_with_ram(driver: RingDriver) -> None:
    driver.available = RAM_BYTES - (6 + 2 * driver.size)
    assert queue_for(driver).pop() is None
    driver.used = RAM_BYTES - (6 + 8 * driver.size) - 2  # the last aligned place
    queue_for(driver)
    driver.used += 4
    with pytest.raises(MemoryAccessError):
        queue_for(driver)


def test_every_write_to_the_used_ring_is_tracked(driver: RingDriver) -> None:
    marks = Marks()
    driver.event_index = True
    queue = queue_for(driver, dma_for(driver.memory, marks=marks))
    queue.push(DescriptorChain(3, 1), 7)
    assert marks.ranges == [(driver.used + 4, 8), (driver.used + 2, 2)]
    queue.ask_for_kick()
    assert marks.ranges[2:] == [(driver.used + 4 + 8 * driver.size, 2)]


def test_the_driver_can_switch_interrupts_off(driver: RingDriver) -> None:
    queue = queue_for(driver)
    assert not queue.wants_interrupt()
    queue.push(DescriptorChain(0, 1), 0)
    assert queue.wants_interrupt()
    driver.publish(flags=1)
    queue.push(DescriptorChain(0, 1), 0)
    assert not queue.wants_interrupt()


@pytest.mark.parametrize(("used_event", "wanted"), [(0, True), (1, True), (2, False), (5, False)])
def test_event_index_interrupts_when_used_event_is_passed(
    driver: RingDriver, used_event: int, wanted: bool
) -> None:
    driver.event_index = True
    queue = queue_for(driver)
    driver.publish(used_event=used_event)
    queue.push(DescriptorChain(0, 1), 0)
    queue.push(DescriptorChain(1, 1), 0)
    assert queue.wants_interrupt() is wanted
    assert not queue.wants_interrupt()


def test_a_request_that_arrived_while_kicks_were_off_is_noticed(driver: RingDriver) -> None:
    driver.event_index = True
    queue = queue_for(driver)
    assert not queue.ask_for_kick()
    driver.describe([Buffer(DATA, 1)])
    driver.publish(0)
    assert queue.ask_for_kick()
    assert driver.read(driver.used + 4 + 8 * driver.size, 2) == b"\0\0"
    assert queue.pop() is not None
    assert not queue.ask_for_kick()
    assert driver.read(driver.used + 4 + 8 * driver.size, 2) == b"\1\0"


def test_heads_lengths_and_indices_are_unsigned(driver: RingDriver) -> None:
    driver.event_index = True
    driver.write(driver.used + 2, b"\xfe\xff")
    queue = queue_for(driver, base=0xFFFE)
    queue.ask_for_kick()
    assert driver.read(driver.used + 4 + 8 * driver.size, 2) == b"\xfe\xff"
    queue.push(DescriptorChain(0x7FFF, 1), 0xFFFF_FFFF)
    assert driver.used_element(0xFFFE) == (0x7FFF, 0xFFFF_FFFF)
