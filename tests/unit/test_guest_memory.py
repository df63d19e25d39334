"""Memory slots and address translation: whole accesses, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dmaproof.errors import MemoryAccessError
from dmaproof.guest_memory import GuestMemory, IovaMap, IovaMapping, map_slot
from qmp_tools.testbed.ring_driver import HVA_BASE, PAGE, guest_memory, ram_fd


@pytest.fixture
def fd() -> Iterator[int]:
    with ram_fd(16 * PAGE) as ram:
        yield ram


def test_a_slot_shows_its_piece_of_the_file(fd: int) -> None:
    os.pwrite(fd, b"here", 5 * PAGE + 10)
    memory = guest_memory(fd, (0x100000, 4 * PAGE, 4 * PAGE))
    assert bytes(memory.view(0x100000 + PAGE + 10, 4)) == b"here"
    memory.view(0x100000, 2)[:] = b"ab"
    assert os.pread(fd, 2, 4 * PAGE) == b"ab"


def test_a_file_offset_need_not_be_page_aligned(fd: int) -> None:
    os.pwrite(fd, b"x", 100)
    assert bytes(guest_memory(fd, (0, PAGE, 100)).view(0, 1)) == b"x"


def test_slots_above_and_below_a_hole(fd: int) -> None:
    memory = guest_memory(fd, (1 << 32, 8 * PAGE, 8 * PAGE), (0, 8 * PAGE, 0))
    memory.view(1 << 32, 1)[:] = b"h"
    assert os.pread(fd, 1, 8 * PAGE) == b"h"
    assert memory.end == (1 << 32) + 8 * PAGE
    with pytest.raises(MemoryAccessError, match="not inside one memory slot"):
        memory.view(8 * PAGE - 1, 2)
    with pytest.raises(MemoryAccessError, match="not inside one memory slot"):
        memory.view(memory.end, 1)


@pytest.mark.parametrize(
    ("length", "offset"), [(0, 0), (17 * PAGE, 0), (PAGE, 16 * PAGE), (1 << 63, 1 << 63)]
)
def test_a_slot_the_file_does_not_hold_is_refused(fd: int, length: int, offset: int) -> None:
    with pytest.raises(MemoryAccessError):
        map_slot(fd, gpa=0, length=length, hva=0, file_offset=offset)


def test_a_slot_beyond_the_address_space_is_refused(fd: int) -> None:
    high = (1 << 64) - PAGE
    for gpa, hva in ((high, 0), (0, high)):
        with pytest.raises(MemoryAccessError, match="64-bit"):
            map_slot(fd, gpa=gpa, length=2 * PAGE, hva=hva, file_offset=0)
    assert map_slot(fd, gpa=high, length=PAGE, hva=high, file_offset=0).end == 1 << 64


def test_slots_may_touch(fd: int) -> None:
    memory = guest_memory(fd, (0, 2 * PAGE, 0), (2 * PAGE, PAGE, 2 * PAGE))
    assert memory.end == 3 * PAGE


def test_overlapping_slots_are_refused(fd: int) -> None:
    with pytest.raises(MemoryAccessError, match="overlap"):
        guest_memory(fd, (0, 2 * PAGE, 0), (PAGE, PAGE, 0))


def test_hva_to_gpa(fd: int) -> None:
    memory = guest_memory(fd, (0x10000, 4 * PAGE, 0))
    assert memory.gpa_of_hva(HVA_BASE + 0x10000 + 7, 8) == 0x10007
    with pytest.raises(MemoryAccessError, match="HVA"):
        memory.gpa_of_hva(HVA_BASE + 0x10000 + 4 * PAGE - 4, 8)


def test_no_slots_hold_nothing() -> None:
    with pytest.raises(MemoryAccessError, match="there are no slots"):
        GuestMemory(()).view(0, 1)


def test_translation_crosses_adjacent_mappings_in_order() -> None:
    iova_map = IovaMap([IovaMapping(0x2000, 0x9000, 0x1000), IovaMapping(0x1000, 0x5000, 0x1000)])
    assert iova_map.translate(0x1800, 0x1000) == [(0x5800, 0x800), (0x9000, 0x800)]
    assert iova_map.translate(0x2000, 0x1000) == [(0x9000, 0x1000)]


@pytest.mark.parametrize(("iova", "length"), [(0xFFF, 2), (0x2FFF, 2), (0x8000, 1)])
def test_translation_of_what_is_not_mapped(iova: int, length: int) -> None:
    iova_map = IovaMap([IovaMapping(0x1000, 0x5000, 0x2000)])
    with pytest.raises(MemoryAccessError, match="nothing is mapped"):
        iova_map.translate(iova, length)


def test_one_page_at_two_iovas() -> None:
    iova_map = IovaMap([IovaMapping(0x1000, 0x5000, 0x1000), IovaMapping(0x3000, 0x5000, 0x1000)])
    assert iova_map.translate(0x1004, 4) == iova_map.translate(0x3004, 4) == [(0x5004, 4)]


def test_overlapping_mappings_are_refused() -> None:
    with pytest.raises(MemoryAccessError, match="overlap"):
        IovaMap([IovaMapping(0, 0, 0x2000), IovaMapping(0x1000, 0, 0x1000)])
