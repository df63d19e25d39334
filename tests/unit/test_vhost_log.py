"""The driver of the kernel's vhost devices: rings, guest memory, comparison with the log."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from dmaproof.units import PAGE_BYTES
from qmp_tools.passthrough.outcome import DefectAbsentError, ProofFailedError
from qmp_tools.passthrough.vhost_log.abi import Feature
from qmp_tools.passthrough.vhost_log.memory import Comparison, GuestMemory, Region
from qmp_tools.passthrough.vhost_log.net import usage
from qmp_tools.passthrough.vhost_log.net_cases import (
    REGIONS,
    USED_BORDER_PAGE,
    Case,
    buffers,
    layout,
    used_pages,
)
from qmp_tools.passthrough.vhost_log.net_findings import require_lost
from qmp_tools.passthrough.vhost_log.net_proofs import require_cleared_bit_shows
from qmp_tools.passthrough.vhost_log.ring import Buffer, Layout, Ring, used_bytes_before
from qmp_tools.passthrough.vhost_log.scsi import StallingDisk

TWO_REGIONS = (Region(4, 8), Region(100, 4))


def memory_of(regions: tuple[Region, ...] = TWO_REGIONS, *, iotlb: bool = False) -> GuestMemory:
    return GuestMemory(regions, random.Random(1), iotlb=iotlb)


def ring_in(memory: GuestMemory, start: int = 0, size: int = 4) -> Ring:
    at = memory.bus
    return Ring(memory, Layout(size, at(4), at(5), at(6), at(7)), start)


def descriptor(memory: GuestMemory, table: int, number: int) -> tuple[int, ...]:
    return struct.unpack("<QIHH", memory.read(table + 16 * number, 16))


def use(memory: GuestMemory, ring: Ring, index: int) -> None:
    """Write the used index, as the device."""
    memory.write(ring.layout.used + 2, struct.pack("<H", index))


# The comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize("iotlb", [False, True])
def test_a_page_that_changes_without_its_bit_is_lost(iotlb: bool) -> None:
    memory = memory_of(iotlb=iotlb)
    memory.snapshot()
    assert memory.compare() == Comparison(frozenset(), frozenset())
    for page in (4, 100):
        byte = memory.read(memory.bus(page) + 1, 1)
        memory.write(memory.bus(page) + 1, bytes([byte[0] ^ 1]))
    first, second = (set(memory.guest_pages(memory.bus(page), 1)) for page in (4, 100))
    for page in (*second, 11):
        memory.log[page // 8] |= 1 << page % 8
    found = memory.compare()
    assert found.changed == first | second
    assert found.lost == first
    assert found.unchanged == {11}
    memory.snapshot()
    assert not memory.compare().logged


def test_a_bit_beyond_the_memory_shows() -> None:
    memory = memory_of()
    memory.snapshot()
    last = memory.pages[-1]
    memory.log[(last + 100) // 8] |= 1 << (last + 100) % 8
    assert memory.compare().unchanged == {last + 100}


def test_a_cleared_bit_must_be_noticed() -> None:
    choose = random.Random(1)
    require_cleared_bit_shows(Comparison(frozenset({1, 2}), frozenset({1, 2, 3})), choose)

    class Blind(Comparison):
        """A comparison that finds no lost page."""

        @property
        def lost(self) -> frozenset[int]:
            return frozenset()

        def without(self, page: int) -> Comparison:
            return self

    with pytest.raises(ProofFailedError, match="the bit of page 0x7 is cleared"):
        require_cleared_bit_shows(Blind(frozenset({7}), frozenset({7})), choose)


def test_a_finding_is_the_loss_of_its_pages_and_a_correct_kernel_loses_none() -> None:
    expected = frozenset({2})
    require_lost(Comparison(frozenset({1, 2}), frozenset({1})), expected)
    with pytest.raises(DefectAbsentError, match="lost pages: none"):
        require_lost(Comparison(frozenset({1, 2}), frozenset({1, 2})), expected)
    for logged in ({2}, set[int]()):
        with pytest.raises(ProofFailedError, match=r"neither .* nor correct: lost pages: 0x1"):
            require_lost(Comparison(frozenset({1, 2}), frozenset(logged)), expected)


# Guest memory ------------------------------------------------------------------------------------


def test_bytes_cross_pages_in_the_order_of_the_bus() -> None:
    for memory in (memory_of(), memory_of(iotlb=True)):
        place = memory.bus(5) - 3
        memory.write(place, b"abcdef")
        assert memory.read(place, 6) == b"abcdef"
        assert memory.read(memory.bus(5), 3) == b"def"
        assert len(memory.guest_pages(place, 6)) == 2
        assert memory.guest_pages(place, 3) == memory.guest_pages(memory.bus(4), 1)


def test_an_iotlb_has_other_addresses_and_another_order() -> None:
    memory = memory_of(iotlb=True)
    mappings = dict(memory.mappings())
    assert len(mappings) == len(set(mappings.values())) == 12
    assert min(mappings) > memory.pages[-1] * PAGE_BYTES
    in_order = [memory.guest_pages(bus, 1) for bus in sorted(mappings)]
    assert in_order != [frozenset({page}) for page in memory.pages]
    assert memory.ring_address(memory.bus(4)) == memory.bus(4)


def test_the_table_has_each_region_with_its_address() -> None:
    memory = memory_of()
    count, _, *fields = struct.unpack("=II8Q", memory.table())
    assert count == 2
    assert fields[0::4] == [4 * PAGE_BYTES, 100 * PAGE_BYTES]
    assert fields[1::4] == [8 * PAGE_BYTES, 4 * PAGE_BYTES]
    assert fields[2::4] == [memory.ring_address(memory.bus(page)) for page in (4, 100)]


# The ring ----------------------------------------------------------------------------------------


def test_chains_take_descriptors_in_the_order_of_the_table_and_wrap() -> None:
    memory = memory_of()
    ring = ring_in(memory, start=65535)
    ring.add([Buffer(0x4321, 5, writable=False), Buffer(0x8000, 7)])
    table = ring.layout.descriptors
    assert descriptor(memory, table, 3) == (0x4321, 5, 1, 0)  # NEXT
    assert descriptor(memory, table, 0) == (0x8000, 7, 2, 0)  # WRITE
    flags, index, *heads = struct.unpack("<HH4H", memory.read(ring.layout.avail, 12))
    assert (flags, index, heads[3]) == (0, 0, 3)
    assert ring.free == 2
    assert ring.capacities == [12]


def test_an_indirect_chain_takes_one_descriptor() -> None:
    memory = memory_of()
    ring = ring_in(memory)
    ring.add([Buffer(0x9000, 1)])
    ring.add([Buffer(0x9000, 3), Buffer(0xA000, 4)], indirect=True)
    table, length, flags, _ = descriptor(memory, ring.layout.descriptors, 1)
    assert (length, flags) == (32, 4)
    assert descriptor(memory, table, 0) == (0x9000, 3, 3, 1)
    assert descriptor(memory, table, 1) == (0xA000, 4, 2, 0)
    assert ring.free == 2
    ring.add([Buffer(0xB000, 5)])
    assert descriptor(memory, ring.layout.descriptors, 2) == (0xB000, 5, 2, 0)


def test_used_chains_are_counted_across_the_end_of_the_index_and_reclaimed() -> None:
    memory = memory_of()
    ring = ring_in(memory, start=65535)
    for length in (10, 20, 30):
        ring.add([Buffer(0x9000, length)])
    assert ring.used() == 0
    use(memory, ring, 1)
    memory.write(ring.layout.used + used_bytes_before(3), struct.pack("<II", 3, 77))
    memory.write(ring.layout.used + used_bytes_before(0), struct.pack("<II", 0, 88))
    assert ring.used() == 2
    assert ring.used_lengths() == [77, 88]
    ring.reclaim()
    assert (ring.used(), ring.capacities, ring.free) == (0, [30], 3)


@pytest.mark.parametrize("start", [0, 65534])
def test_the_device_has_taken_all_chains_if_it_asks_for_a_notification_of_the_next(
    start: int,
) -> None:
    memory = memory_of()
    ring = ring_in(memory, start)
    for _ in range(2):
        ring.add([Buffer(0x9000, 1)])
    event = ring.layout.used + 4 + 8 * ring.layout.size
    for taken in (1, 2):
        memory.write(event, struct.pack("<H", (start + taken) % 65536))
        assert ring.is_taken() is (taken == 2)


# vhost-scsi --------------------------------------------------------------------------------------


def test_a_stalling_disk_has_no_data_until_it_answers_all_reads(tmp_path: Path) -> None:
    disk = StallingDisk(tmp_path / "disk", random.Random(1))
    reader = os.open(tmp_path / "disk", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        disk.answer()
        assert len(os.read(reader, 1 << 20)) == 12 * 32 * 512
    finally:
        os.close(reader)
        disk.close()


# vhost-net ---------------------------------------------------------------------------------------


def test_frames_use_one_chain_each_or_several_if_mergeable() -> None:
    assert usage([10, 10], [20, 20, 20], mergeable=False) == (2, 2)
    assert usage([10, 10], [20], mergeable=False) == (1, 1)
    assert usage([30], [20, 20], mergeable=False) == (0, 0)
    assert usage([50, 20], [20, 20, 20, 20], mergeable=True) == (2, 4)
    assert usage([50, 21], [20, 20, 20, 20], mergeable=True) == (1, 3)
    assert usage([], [20], mergeable=True) == (0, 0)


@pytest.mark.parametrize("iotlb", [False, True])
def test_random_rings_and_buffers_have_pages_of_their_own(iotlb: bool) -> None:
    borders = 0
    for number in range(200):
        choose = random.Random(number)
        memory = GuestMemory(REGIONS, choose, iotlb=iotlb)
        fixed = [Feature.IN_ORDER] if number % 2 else []
        case = Case.random(choose, memory, fixed)
        placed = layout(memory, case.size, case.used)
        ring = memory.guest_pages(placed.used, placed.used_bytes)
        assert case.used % 4 == 0
        assert Feature.LOG_ALL in case.features
        assert ring <= used_pages(memory)
        if iotlb or fixed:
            assert len(ring) == 1
        borders += len(ring) == 2
        for buffer in buffers(choose, memory, [1, 5000, 30_000]):
            pages = memory.guest_pages(buffer.bus, buffer.length)
            assert not pages & used_pages(memory)
            tables = memory.bus(USED_BORDER_PAGE + 2) - memory.bus(REGIONS[0].page)
            assert not pages & memory.guest_pages(memory.bus(REGIONS[0].page), tables)
    assert borders == 0 if iotlb else borders > 90
