"""Memory slots and address translation: an access succeeds as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dmaproof.errors import MemoryAccessError, ProtocolError
from dmaproof.guest_memory import GuestMemory, IovaMap, IovaMapping, MemorySlot, map_slot
from qmp_tools.testbed.ring_driver import HVA_BASE, PAGE, guest_memory, ram_fd
from support.host_pages import HOST_PAGE


@pytest.fixture
def fd() -> Iterator[int]:
    with ram_fd(16 * PAGE) as ram:
        yield ram


def test_a_slot_maps_its_part_of_the_file(fd: int) -> None:
    os.pwrite(fd, b"here", 5 * PAGE + 10)
    memory = guest_memory(fd, (0x100000, 4 * PAGE, 4 * PAGE))
    assert bytes(memory.view(0x100000 + PAGE + 10, 4)) == b"here"
    memory.view(0x100000, 2)[:] = b"ab"
    assert os.pread(fd, 2, 4 * PAGE) == b"ab"


def test_a_file_offset_need_not_be_page_aligned(fd: int) -> None:
    os.pwrite(fd, b"x", 100)
    assert bytes(guest_memory(fd, (0, PAGE, 100)).view(0, 1)) == b"x"


def test_slots_above_and_below_a_hole_are_separate(fd: int) -> None:
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
def test_a_slot_beyond_the_end_of_its_file_is_refused(fd: int, length: int, offset: int) -> None:
    with pytest.raises(MemoryAccessError):
        map_slot(fd, gpa=0, length=length, hva=0, file_offset=offset)


def test_a_slot_beyond_the_address_space_is_refused(fd: int) -> None:
    high = (1 << 64) - PAGE
    for gpa, hva in ((high, 0), (0, high)):
        with pytest.raises(MemoryAccessError, match="64-bit"):
            map_slot(fd, gpa=gpa, length=2 * PAGE, hva=hva, file_offset=0)
    assert map_slot(fd, gpa=high, length=PAGE, hva=high, file_offset=0).end == 1 << 64


def test_slots_may_be_adjacent(fd: int) -> None:
    memory = guest_memory(fd, (0, 2 * PAGE, 0), (2 * PAGE, PAGE, 2 * PAGE))
    assert memory.end == 3 * PAGE


def test_overlapping_slots_are_refused(fd: int) -> None:
    with pytest.raises(MemoryAccessError, match="overlap"):
        guest_memory(fd, (0, 2 * PAGE, 0), (PAGE, PAGE, 0))


def test_an_hva_leads_to_its_gpa(fd: int) -> None:
    memory = guest_memory(fd, (0x10000, 4 * PAGE, 0))
    assert memory.gpa_of_hva(HVA_BASE + 0x10000 + 7, 8) == 0x10007
    with pytest.raises(MemoryAccessError, match="HVA"):
        memory.gpa_of_hva(HVA_BASE + 0x10000 + 4 * PAGE - 4, 8)


def test_memory_without_slots_refuses_every_address() -> None:
    with pytest.raises(MemoryAccessError, match="the guest has no slots"):
        GuestMemory(()).view(0, 1)


def test_translation_crosses_adjacent_mappings_in_order() -> None:
    iova_map = IovaMap([IovaMapping(0x2000, 0x9000, 0x1000), IovaMapping(0x1000, 0x5000, 0x1000)])
    assert iova_map.translate(0x1800, 0x1000) == [(0x5800, 0x800), (0x9000, 0x800)]
    assert iova_map.translate(0x2000, 0x1000) == [(0x9000, 0x1000)]


@pytest.mark.parametrize(("iova", "length"), [(0xFFF, 2), (0x2FFF, 2), (0x8000, 1)])
def test_an_iova_that_is_not_mapped_is_refused(iova: int, length: int) -> None:
    iova_map = IovaMap([IovaMapping(0x1000, 0x5000, 0x2000)])
    with pytest.raises(MemoryAccessError, match="nothing is mapped"):
        iova_map.translate(iova, length)


def test_a_page_can_have_two_iovas() -> None:
    iova_map = IovaMap([IovaMapping(0x1000, 0x5000, 0x1000), IovaMapping(0x3000, 0x5000, 0x1000)])
    assert iova_map.translate(0x1004, 4) == iova_map.translate(0x3004, 4) == [(0x5004, 4)]


def test_overlapping_mappings_are_refused() -> None:
    with pytest.raises(MemoryAccessError, match="overlap"):
        IovaMap([IovaMapping(0, 0, 0x2000), IovaMapping(0x1000, 0, 0x1000)])


# Edges, and ranges that are only partly mapped --------------------------------------------------


def slot(fd: int, gpa: int, pages: int, *, hva: int, offset: int) -> MemorySlot:
    return map_slot(fd, gpa=gpa, length=pages * PAGE, hva=hva, file_offset=offset)


def test_a_slot_knows_the_file_and_offset_of_its_bytes(fd: int) -> None:
    found = slot(fd, 0x10000, 2, hva=0x7000, offset=3 * PAGE)
    status = os.fstat(fd)
    assert (found.gpa, found.length, found.hva) == (0x10000, 2 * PAGE, 0x7000)
    assert (found.file_offset, found.device) == (3 * PAGE, status.st_dev)
    assert found.inode == status.st_ino
    assert not found.mapping.lost
    assert found.end == 0x10000 + 2 * PAGE


@pytest.mark.parametrize(("gpa", "length"), [(PAGE // 2, PAGE), (0, PAGE // 2), (PAGE, PAGE + 8)])
def test_a_slot_with_a_partial_page_is_refused(fd: int, gpa: int, length: int) -> None:
    with pytest.raises(MemoryAccessError, match="expected whole pages"):
        map_slot(fd, gpa=gpa, length=length, hva=0, file_offset=0)


def test_a_slot_can_be_viewed_from_its_first_to_its_last_byte(fd: int) -> None:
    memory = GuestMemory([slot(fd, 0x10000, 2, hva=0, offset=4 * PAGE)])
    memory.view(0x10000, 1)[:] = b"a"
    memory.view(0x10000 + 2 * PAGE - 1, 1)[:] = b"z"
    assert len(memory.view(0x10000, 2 * PAGE)) == 2 * PAGE
    assert os.pread(fd, 2 * PAGE, 4 * PAGE) == b"a" + bytes(2 * PAGE - 2) + b"z"
    for gpa, length in ((0x10000 - 1, 1), (0x10000, 2 * PAGE + 1), (0x10000 + 2 * PAGE, 1)):
        with pytest.raises(MemoryAccessError, match="slots: 0x10000-0x11fff"):
            memory.view(gpa, length)


def test_a_hole_between_slots_is_refused_from_both_sides(fd: int) -> None:
    """RAM lies below and above a hole, as around the VGA window; the file has no hole."""
    memory = guest_memory(fd, (0, 4 * PAGE, 0), (6 * PAGE, 4 * PAGE, 6 * PAGE))
    iova_map = IovaMap.identity(memory)
    for gpa, length in ((4 * PAGE - 1, 2), (5 * PAGE, 1), (6 * PAGE - 1, 2), (3 * PAGE, 4 * PAGE)):
        with pytest.raises(MemoryAccessError, match="slots: 0x0-0x3fff, 0x6000-0x9fff"):
            memory.view(gpa, length)
        with pytest.raises(MemoryAccessError, match=r"nothing is mapped at 0x(4000|5000|5fff)"):
            iova_map.translate(gpa, length)
    memory.view(6 * PAGE, 1)[:] = b"u"
    memory.view(4 * PAGE - 1, 1)[:] = b"l"
    assert os.pread(fd, 1, 6 * PAGE) == b"u"
    assert os.pread(fd, 1, 4 * PAGE - 1) == b"l"


def test_each_slot_has_its_own_offset_between_hva_and_gpa(fd: int) -> None:
    low = slot(fd, 0x10000, 2, hva=0x7F00_0000_0000, offset=0)
    high = slot(fd, 1 << 32, 2, hva=0x5000_0000, offset=2 * PAGE)
    memory = GuestMemory([low, high])
    for part in (low, high):
        assert memory.gpa_of_hva(part.hva, 1) == part.gpa
        assert memory.gpa_of_hva(part.hva, 2 * PAGE) == part.gpa
        assert memory.gpa_of_hva(part.hva + 2 * PAGE - 1, 1) == part.end - 1
        for hva, length in ((part.hva - 1, 1), (part.hva + 1, 2 * PAGE), (part.hva + 2 * PAGE, 1)):
            with pytest.raises(MemoryAccessError, match="is not inside one memory slot"):
                memory.gpa_of_hva(hva, length)


def test_without_an_iommu_each_slot_is_mapped_to_itself(fd: int) -> None:
    memory = guest_memory(fd, (0, 2 * PAGE, 0), (1 << 32, PAGE, 2 * PAGE))
    iova_map = IovaMap.identity(memory)
    assert iova_map.mappings == ((0, 0, 2 * PAGE), (1 << 32, 1 << 32, PAGE))
    assert iova_map.ranges == [(0, 2 * PAGE), (1 << 32, PAGE)]


@pytest.mark.parametrize(
    ("iova", "length", "pieces"),
    [
        (0x1000, 0x3000, [(0x5000, 0x1000), (0x9000, 0x1000), (0x7000, 0x1000)]),
        (0x1FFF, 0x1002, [(0x5FFF, 1), (0x9000, 0x1000), (0x7000, 1)]),
        (0x1004, 0xFFC, [(0x5004, 0xFFC)]),
        (0x2000, 1, [(0x9000, 1)]),
        (0x3FFF, 1, [(0x7FFF, 1)]),
        (0x8010, 0x10, [(0x1010, 0x10)]),
    ],
)
def test_each_piece_keeps_its_offset(iova: int, length: int, pieces: list[tuple[int, int]]) -> None:
    iova_map = IovaMap(
        IovaMapping(at, gpa, 0x1000)
        for at, gpa in ((0x1000, 0x5000), (0x2000, 0x9000), (0x3000, 0x7000), (0x8000, 0x1000))
    )
    assert iova_map.translate(iova, length) == pieces


def test_a_slot_whose_file_is_truncated_is_reported() -> None:
    with ram_fd(2 * HOST_PAGE) as fd:
        memory = guest_memory(fd, (0, HOST_PAGE, 0), (HOST_PAGE, HOST_PAGE, HOST_PAGE))
        memory.check()
        os.ftruncate(fd, HOST_PAGE)
        bytes(memory.view(HOST_PAGE, 1))
        slot = rf"GPA {HOST_PAGE:#x} \+ {HOST_PAGE:#x}"
        with pytest.raises(ProtocolError, match=f"{slot}: its file was truncated"):
            memory.check()
