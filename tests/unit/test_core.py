"""The C core at its edges: the last bit, the next word, the first entry of the next node."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof import _core
from dmaproof.units import div_ceil
from support.core import (
    DIRTY,
    GROUP,
    HUGE,
    NODE,
    PAGE,
    PRESENT,
    Bytes,
    amd,
    as_number,
    pairs,
    words,
)

TOP = (1 << 64) - 1


def ones(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def runs_of(bits: int) -> list[tuple[int, int]]:
    found, at = [], 0
    while bits >> at:
        at += ((bits >> at) & -(bits >> at)).bit_length() - 1
        length = (~(bits >> at) & (bits >> at) + 1).bit_length() - 1
        found.append((at, length))
        at += length
    return found


@pytest.mark.parametrize("around", [0x00, 0xFF])
@pytest.mark.parametrize("shared", [True, False])
def test_bytes_around_a_ragged_bitmap_stay_unchanged(around: int, shared: bool) -> None:
    """Other bytes of the same words belong to other users, who may be writing them."""
    for start in range(8):
        for size in (1, 5, 8, 13, 24, 77):
            memory = bytearray([around]) * 96
            data = memoryview(memory)[start : start + size]
            source = bytes([0xFF]) * 96

            def expect(inside: int) -> None:
                expected = bytearray([around]) * 96
                expected[start : start + size] = bytes([inside]) * size  # noqa: B023
                assert memory == expected  # noqa: B023

            _core.take_set(data, 0, 8 * size)
            expect(0)
            assert _core.set_bits(data, 0, 8 * size, shared) == 8 * size
            expect(0xFF)
            data[:] = bytes(size)
            pages = np.arange(8 * size, dtype=np.uint64)
            assert _core.set_ranges(data, 0, 8 * size - 1, 0, pages, 1, shared) == 8 * size
            expect(0xFF)
            for bit in (0, 3):
                data[:] = bytes(size)
                assert _core.or_bits(data, 0, source, bit, 8 * size, shared) == 8 * size
                expect(0xFF)


# Runs of bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("filled", [False, True])
def test_one_differing_bit_is_found_at_every_position(start: int, filled: bool) -> None:
    size = 8 * 45
    for bit in range(0, 8 * size, 13):
        data = bytearray([0xFF if filled else 0]) * (size + start)
        view = memoryview(data)[start:]
        view[bit // 8] ^= 1 << bit % 8
        expected = as_number(view)
        assert pairs(_core.find_set(view, 0, 8 * size)) == runs_of(expected)
        assert _core.count_bits(view, 0, 8 * size) == expected.bit_count()
        assert pairs(_core.take_set(view, 0, 8 * size)) == runs_of(expected)
        assert not any(view)


@pytest.mark.parametrize("first", [0, 64 * 40 + 3])
def test_a_bit_after_many_empty_words_is_found(first: int) -> None:
    """The core skips empty words sixteen at a time."""
    for bit in range(first, first + 64 * 70, 131):
        data = bytearray(8 * 120)
        _core.set_bits(data, bit, 1)
        assert pairs(_core.find_set(data, first, 64 * 70)) == [(bit - first, 1)]
        assert pairs(_core.take_set(data, first, 64 * 70)) == [(bit - first, 1)]


def test_the_memory_for_runs_grows() -> None:
    for size in (30, 64, 100, 512, 4000):
        data = bytearray(b"\x55") * size
        assert pairs(_core.find_set(data, 0, 8 * size)) == [(2 * i, 1) for i in range(4 * size)]


def test_runs_are_relative_to_the_first_bit() -> None:
    data = bytearray(16)
    _core.set_bits(data, 60, 10)
    assert pairs(_core.find_set(data, 62, 66)) == [(0, 8)]
    assert pairs(_core.take_set(data, 61, 4)) == [(0, 4)]
    assert runs_of(as_number(data)) == [(60, 1), (65, 5)]
    assert pairs(_core.find_set(data, 0, 0)) == []


# OR of bitmaps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_or_sets_the_right_bits_for_every_length_and_alignment(shared: bool) -> None:
    rng = random.Random(1)
    for count in (0, 1, 63, 64, 65, 127, 128, 511, 512, 513, 576, 640, 1023, 1100):
        for into_bit in (0, 1, 8, 63, 64):
            for source_bit in (0, 1, 5, 7, 8, 60, 63, 64, 65):
                source = rng.randbytes(div_ceil(source_bit + count, 8))
                into = bytearray(rng.randbytes(div_ceil(into_bit + count, 8)))
                before = as_number(into)
                wanted = before | (as_number(source) >> source_bit & ones(0, count)) << into_bit
                added = _core.or_bits(into, into_bit, source, source_bit, count, shared)
                assert as_number(into) == wanted
                assert added == (wanted & ~before).bit_count()


def test_or_between_page_sizes_joins_runs_across_two_pieces() -> None:
    """or_pages finds runs in pieces of 2^20 bits."""
    piece = 1 << 20
    source = bytearray(2 * piece // 8 + 8)
    expected = 0
    for first, count in ((5, 1), (piece - 3, 6), (2 * piece - 1, 1), (2 * piece + 63, 1)):
        _core.set_bits(source, first, count)
        expected |= ones(first >> 2, (first + count - 1 >> 2) - (first >> 2) + 1)
    into = bytearray(len(source) // 4)
    bits = 8 * len(source)
    added = _core.or_pages(into, 0, 14, source, 0, 12, 0, (bits << 12) - 1)
    assert as_number(into) == expected
    assert added == expected.bit_count()
    into = bytearray(len(source) // 4)
    # Up to the last page of the first piece, and from the first page of the second one on.
    assert _core.or_pages(into, 0, 14, source, 0, 12, 0, (piece << 12) - 1) == 2
    assert _core.or_pages(into, 0, 14, source, 0, 12, piece << 12, (bits << 12) - 1) == 3


def test_or_between_page_sizes_stays_within_the_given_bytes() -> None:
    source = bytearray(b"\x06")  # pages 9 and 10 of 8 KiB
    for iova, last, wanted in [
        (8 * 8192, 9 * 8192 - 1, 0),
        (8 * 8192, 9 * 8192, 1 << 2),
        (9 * 8192 + PAGE - 1, 10 * 8192 - 1, 3 << 2),
        (9 * 8192 + PAGE, 10 * 8192 - 1, 1 << 3),
        (9 * 8192, 11 * 8192 - 1, 15 << 2),
        (11 * 8192 - 1, 12 * 8192, 1 << 5),
        (11 * 8192, 12 * 8192, 0),
    ]:
        into = bytearray(2)
        assert _core.or_pages(into, 16, 12, source, 8, 13, iova, last) == wanted.bit_count()
        assert as_number(into) == wanted


@pytest.mark.parametrize("byte", [0, 1, 9, 15])
def test_or_of_one_page_of_one_byte_sets_one_bit(byte: int) -> None:
    for into_shift in (0, 1, 3):
        into, source = bytearray(2), bytearray(2)
        _core.set_bits(source, byte, 1)
        assert _core.or_pages(into, 0, into_shift, source, 0, 0, 0, 15) == 1
        assert as_number(into) == 1 << (byte >> into_shift)


def test_or_reaches_the_end_of_the_address_space() -> None:
    into, source = bytearray(1), bytearray(b"\x80")
    assert _core.or_pages(into, (1 << 52) - 8, 12, source, (1 << 51) - 8, 13, TOP - 9999, TOP) == 2
    assert into == b"\xc0"
    for shifts in ((63, 12), (12, 63)):
        page = [(1 << 64 - shift) - 1 for shift in shifts]
        into, source = bytearray(1), bytearray(b"\x01")
        arguments = (into, page[0], shifts[0], source, page[1], shifts[1], TOP, TOP)
        assert _core.or_pages(*arguments) == 1
        assert into == b"\x01"


# Ranges -------------------------------------------------------------------------------------------


def check_ranges(
    data: Bytes,
    first: int,
    last: int,
    shift: int,
    iovas: Sequence[int],
    lengths: Sequence[int] | int,
) -> None:
    """Set ranges in `data`, with and without atomics, and compare with plain numbers."""
    before = bytes(data)
    expected = as_number(before)
    for iova, length in zip(
        iovas, [lengths] * len(iovas) if isinstance(lengths, int) else lengths, strict=True
    ):
        low = (iova >> shift) - (first >> shift)
        expected |= ones(low, (iova + length - 1 >> shift) - (first >> shift) - low + 1)
    of_each = lengths if isinstance(lengths, int) else words(lengths)
    for shared in (True, False):
        data[:] = before
        added = _core.set_ranges(data, first, last, shift, words(iovas), of_each, shared)
        assert as_number(data) == expected
        assert added == (expected & ~as_number(before)).bit_count()


@pytest.mark.parametrize("first_page", [0, 1, 77])
@pytest.mark.parametrize("apart", [1, 62, 63, 64, 65, 127, 128])
def test_neighbouring_pages_in_one_word_and_in_the_next_are_set(
    apart: int, first_page: int
) -> None:
    """Crowded reports in one word are written together; a page 64 pages away is in another word."""
    crowd = [5, 5, 4, 3, 60, 59, 61, 5]
    for place in (0, 1, 7):
        for base in (0, 1, 63, 64):
            for rest in range(4):
                pages = crowd * 12
                pages[40 : 40 + 8] = [base] * 8
                pages[40 + place] = base + apart
                pages += crowd[:rest]
                check_ranges(
                    bytearray(80),
                    first_page * PAGE,
                    (first_page + 640) * PAGE - 1,
                    12,
                    [(first_page + page) * PAGE + 17 for page in pages],
                    1,
                )


@pytest.mark.parametrize("shift", [0, 1, 2, 6])
def test_crowded_reports_of_small_pages_are_set(shift: int) -> None:
    for iova in (1, 5, 62 << shift):
        iovas = [iova, iova + 1] * 40
        check_ranges(bytearray(8), 0, (64 << shift) - 1, shift, iovas, 1)


def test_any_number_of_pages_is_set_in_any_order() -> None:
    rng = random.Random(2)
    for count in (0, 1, 7, 8, 9, 15, 16, 31, 32, 33, 40, 100):
        for spread in (1, 8, 64, 512, 4096, 8 * 4096):
            start = rng.randrange(8 * 4096 - spread + 1)
            iovas = [(3 + start + rng.randrange(spread)) << 12 for _ in range(count)]
            data = bytearray(rng.randbytes(4096))
            check_ranges(data, 3 << 12, ((3 + 8 * 4096) << 12) - 1, 12, iovas, PAGE)


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("size", [8, 13, 16, 64])
def test_pages_of_a_ragged_bitmap_are_set(start: int, size: int) -> None:
    memory = bytearray(80)
    data = memoryview(memory)[start : start + size]
    bits = 8 * size
    check_ranges(data, 0, bits * PAGE - 1, 12, [page * PAGE for page in range(bits)], 1)
    assert not any(memory[:start])
    assert not any(memory[start + size :])


def test_a_range_that_ends_with_its_page_touches_no_other() -> None:
    for iova, lengths in [
        (PAGE, [PAGE, PAGE + 1, 1]),
        (PAGE + 1, [PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE]),
        (2 * PAGE - 1, [1, 2, PAGE + 1, PAGE + 2, 200 * PAGE]),
    ]:
        for length in lengths:
            check_ranges(bytearray(40), 0, 320 * PAGE - 1, 12, [iova], length)
            check_ranges(bytearray(40), 0, 320 * PAGE - 1, 12, [iova, iova], [length, 1])


@pytest.mark.parametrize("shift", [0, 1, 5, 12])
def test_ranges_of_several_pages_are_set_at_every_start(shift: int) -> None:
    page = 1 << shift
    for start in range(0, 9 * page, max(1, page // 4)):
        for length in {1, 2, page - 1, page, page + 1, 2 * page, 2 * page + 1, 5 * page} - {0}:
            for iova in {start, start + 1, start + page - 1}:
                check_ranges(bytearray(8), 0, 64 * page - 1, shift, [iova], length)
                check_ranges(bytearray(8), 0, 64 * page - 1, shift, [iova], [length])


@pytest.mark.parametrize("first", [0, 3 * PAGE, 3 * PAGE + 5])
def test_ranges_may_touch_both_ends_of_the_bitmap_but_not_exceed_them(first: int) -> None:
    last = first + 64 * PAGE - 9
    data = bytearray(9)
    check_ranges(data, first, last, 12, [first, last], 1)
    check_ranges(data, first, last, 12, [first], last - first + 1)
    check_ranges(data, first, last, 12, [first + 1], [last - first])
    for iova, length in [
        (first - 1, 1), (first - 1, 2), (last + 1, 1), (last, 2), (first, last - first + 2),
        (first, 0), (last, 0), (last + 1, 0), (last, TOP), (first, TOP), (first + 1, TOP),
    ]:  # fmt: skip
        if iova < 0:
            continue
        for place in (0, 1, 2):
            iovas, lengths = [first] * 3, [1] * 3
            iovas[place], lengths[place] = iova, length
            untouched = bytearray(9)
            with pytest.raises(ValueError, match="a range is empty or not wholly inside"):
                _core.set_ranges(untouched, first, last, 12, words(iovas), words(lengths), True)
            if length != 1:
                with pytest.raises(ValueError, match="a range is empty or not wholly inside"):
                    _core.set_ranges(untouched, first, last, 12, words([iova]), length, True)
            assert not any(untouched)


def test_ranges_of_the_whole_address_space_are_set() -> None:
    check_ranges(bytearray(8), 0, TOP, 58, [0, TOP, 5 << 58], [1, 1, 1])
    check_ranges(bytearray(8), 0, TOP, 58, [1], TOP)
    check_ranges(bytearray(1), 0, TOP, 63, [1 << 63, TOP] * 20, 1)
    data = bytearray(8)
    with pytest.raises(ValueError, match="empty"):  # a length of 0 does not mean 2^64
        _core.set_ranges(data, 0, TOP, 58, words([0]), 0, True)
    assert not any(data)


# Page tables --------------------------------------------------------------------------------------

Table = NDArray[np.uint64]


def two_nodes() -> Table:
    """Return a root of level 2 whose first two entries lead to nodes full of clean pages."""
    table = np.zeros((3, 512), dtype=np.uint64)
    table[0, :2] = [PAGE | NODE | PRESENT, 2 * PAGE | NODE | PRESENT]
    table[1:] = PRESENT
    return table


def dirty_pages(table: Table) -> list[int]:
    return np.flatnonzero(table[1:].ravel() & np.uint64(DIRTY)).tolist()


@pytest.mark.parametrize(
    ("iova", "last", "marked"),
    [
        (0, 0, [0]),
        (PAGE - 1, PAGE, [0, 1]),
        (PAGE, 2 * PAGE - 1, [1]),
        (HUGE - 1, HUGE - 1, [511]),
        (HUGE, HUGE, [512]),
        (HUGE - 1, HUGE, [511, 512]),
        (HUGE - PAGE, HUGE + PAGE - 1, [511, 512]),
        (2 * HUGE - 1, TOP, [1023]),
        (2 * HUGE, TOP, []),
        (0, TOP, list(range(1024))),
    ],
)
def test_a_write_marks_each_page_it_touches_and_no_other(
    iova: int, last: int, marked: list[int]
) -> None:
    table = two_nodes()
    _core.mark_table(table, amd(2), iova, last)
    assert dirty_pages(table) == marked
    _core.mark_table(table, amd(2), iova, last)
    assert dirty_pages(table) == marked
    table[1:] &= np.uint64(~DIRTY & TOP)
    assert (table == two_nodes()).all()


@pytest.mark.parametrize(
    ("iova", "last", "found", "left"),
    [
        (0, TOP, [(0, PAGE), (HUGE - PAGE, 2 * PAGE)], []),
        (HUGE - PAGE, HUGE - 1, [(HUGE - PAGE, PAGE)], [0, 512]),
        (HUGE, HUGE + PAGE - 1, [(HUGE, PAGE)], [0, 511]),
        (HUGE - PAGE + 1, HUGE, [(HUGE - PAGE + 1, PAGE)], [0, 511, 512]),
        (HUGE - PAGE, HUGE + PAGE - 2, [(HUGE - PAGE, 2 * PAGE - 1)], [0, 512]),
        (PAGE - 1, PAGE - 1, [(PAGE - 1, 1)], [0, 511, 512]),
        (PAGE, HUGE - PAGE - 1, [], [0, 511, 512]),
    ],
)
def test_dirty_pages_are_clipped_and_cleared_only_if_queried_whole(
    iova: int, last: int, found: list[tuple[int, int]], left: list[int]
) -> None:
    table = two_nodes()
    table[1, [0, 511]] |= DIRTY
    table[2, 0] |= DIRTY
    assert pairs(_core.read_table(table, amd(2), iova, last, False)) == found
    assert dirty_pages(table) == [0, 511, 512]
    assert pairs(_core.read_table(table, amd(2), iova, last, True)) == found
    assert dirty_pages(table) == left


def test_entries_that_are_not_present_are_ignored() -> None:
    table = two_nodes()
    table[1, 1] = DIRTY
    table[1, 2] = 0
    assert pairs(_core.read_table(table, amd(2), 0, TOP, True)) == []
    assert table[1, 1] == DIRTY
    _core.mark_table(table, amd(2), 2 * PAGE, 2 * PAGE)
    assert table[1, 2] == 0


def test_only_a_pointer_of_the_next_level_leads_to_a_node() -> None:
    """An entry of another kind maps memory of the level's own size."""
    table = np.zeros((2, 512), dtype=np.uint64)
    for level, size in ((2, HUGE), (3, 512 * HUGE)):
        for kind in range(7):
            table[0, 1] = PAGE | kind * NODE | PRESENT | DIRTY
            found = pairs(_core.read_table(table, amd(level), 0, TOP, False))
            assert found == ([] if kind == level - 1 else [(size, size)])
    table[0, 1] = PAGE | NODE | PRESENT  # level 1 has no nodes below it
    _core.mark_table(table, amd(1), PAGE, PAGE)
    assert table[0, 1] == PAGE | NODE | PRESENT | DIRTY


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("size_log", range(9))
def test_the_entries_of_a_group_are_one_page(level: int, size_log: int) -> None:
    """The 2^n entries of a group are one page; the hardware may mark any of them."""
    own = PAGE if level == 1 else HUGE
    size, count = own << size_log, 1 << size_log
    for head in (0, count, 512 - count):
        for marked in {head, head + count // 2, head + count - 1}:
            table = np.zeros((1, 512), dtype=np.uint64)
            table[0] = PRESENT
            table[0, head : head + count] = size // 2 - PAGE | GROUP | PRESENT if size > PAGE else 1
            table[0, marked] |= DIRTY
            if head + count < 512:
                table[0, head + count] |= DIRTY
            before = table.copy()
            both = [(head * own, size + (own if head + count < 512 else 0))]
            assert pairs(_core.read_table(table, amd(level), 0, TOP, False)) == both
            assert (table == before).all()
            inside = head * own + size - 1
            read = _core.read_table(table, amd(level), inside, inside, True)
            assert pairs(read) == [(inside, 1)]
            assert (table == before).all() == (size > 1)
            read = _core.read_table(table, amd(level), head * own, inside, True)
            assert pairs(read) == [(head * own, size)]
            assert not (table[0, head : head + count] & np.uint64(DIRTY)).any()
            if head + count < 512:
                assert table[0, head + count] == before[0, head + count]


def test_an_impossible_group_size_counts_as_one_entry() -> None:
    table = np.zeros((1, 512), dtype=np.uint64)
    for level, own in ((1, PAGE), (2, HUGE), (3, 512 * HUGE)):
        for size in (own, own << 9):
            if size == PAGE:
                continue
            table[0, 16:] = size // 2 - PAGE | GROUP | PRESENT
            table[0, 17] |= DIRTY
            found = pairs(_core.read_table(table, amd(level), 0, TOP, False))
            assert found == [(17 * own, own)]
    layout = amd(1, group=0)
    table[0, 16:] = GROUP | PRESENT | 7 * PAGE
    table[0, 17] |= DIRTY
    assert pairs(_core.read_table(table, layout, 0, TOP, False)) == [(17 * PAGE, PAGE)]


def test_a_pointer_outside_the_memory_is_refused_and_ends_the_walk() -> None:
    for pages, node in [(1, 1), (2, 2), (2, 1 << 30)]:
        table = np.zeros((pages, 512), dtype=np.uint64)
        table[0, :3] = [PRESENT, node * PAGE | NODE | PRESENT, PRESENT]
        before = table.copy()
        before[0, 0] |= DIRTY
        with pytest.raises(ValueError, match="outside the tables' memory"):
            _core.mark_table(table, amd(2), 0, TOP)
        assert (table == before).all()
        with pytest.raises(ValueError, match="outside the tables' memory"):
            _core.read_table(table, amd(2), 0, TOP, True)
    table = np.zeros((2, 512), dtype=np.uint64)
    for root in (8, 2048, PAGE + 8, 2 * PAGE, 3 * PAGE, TOP - PAGE + 1):
        with pytest.raises(ValueError, match="outside the tables' memory"):
            _core.mark_table(table, amd(1, root=root), 0, TOP)
    for size in (8, PAGE - 8, 2 * PAGE - 8):
        root = size // PAGE * PAGE
        with pytest.raises(ValueError, match="outside the tables' memory"):
            _core.mark_table(bytearray(size), amd(1, root=root), 0, TOP)
    table[1, 0] = PRESENT
    _core.mark_table(table, amd(1, root=PAGE), 0, 0)
    assert table[1, 0] == PRESENT | DIRTY


@pytest.mark.parametrize("levels", range(1, 7))
def test_tables_of_one_to_six_levels_are_walked(levels: int) -> None:
    """Each walk takes the entry with the greatest index, down to the last page of 64 bits."""
    table = np.zeros((levels, 512), dtype=np.uint64)
    iova = TOP if levels == 6 else (1 << 12 + 9 * levels) - 1
    for level in range(levels, 0, -1):
        index = iova >> 12 + 9 * (level - 1) & 511
        node = (levels - level + 1) * PAGE | (level - 1) * NODE
        table[levels - level, index] = PRESENT | (node if level > 1 else 0)
    _core.mark_table(table, amd(levels), iova, iova)
    read = _core.read_table(table, amd(levels), 0, TOP, True)
    assert pairs(read) == [(iova - PAGE + 1, PAGE)]
    assert pairs(_core.read_table(table, amd(levels), 0, TOP, True)) == []


def test_the_memory_for_dirty_pages_grows() -> None:
    table = two_nodes()
    table[1:, ::2] |= DIRTY
    wanted = [(2 * i * PAGE, PAGE) for i in range(512)]
    assert pairs(_core.read_table(table, amd(2), 0, TOP, True)) == wanted
    assert dirty_pages(table) == []


@pytest.mark.parametrize(
    ("memory", "levels", "iova", "last"),
    [
        (bytearray(PAGE), 0, 0, 1),
        (bytearray(PAGE), 7, 0, 1),
        (bytearray(PAGE), 1, 2, 1),
        (memoryview(bytearray(PAGE + 8))[4:-4], 1, 0, 1),
    ],
)
def test_impossible_walks_are_refused(memory: Any, levels: int, iova: int, last: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 6 levels"):
        _core.mark_table(memory, amd(levels), iova, last)
    with pytest.raises(ValueError, match="expected 1 to 6 levels"):
        _core.read_table(memory, amd(levels), iova, last, True)


# Pages that differ --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 255, 256, 257, 300, 511, 512, 513])
def test_one_differing_byte_makes_its_page_differ(size: int) -> None:
    for at in range(size):
        page = bytearray(3 * size)
        page[size + at] = 0x40
        for other in (None, bytes(3 * size)):
            differing = bytearray(1)
            assert _core.differing_pages(page, other, size, differing) == 1
            assert differing == b"\x02"


# Arguments ----------------------------------------------------------------------------------------


def test_a_call_may_use_all_bits_of_a_bitmap_or_none() -> None:
    data = bytearray(8)
    assert _core.set_bits(data, 64, 0) == 0
    assert _core.set_bits(data, 63, 1) == 1
    assert _core.set_bits(data, 0, 64) == 63
    assert _core.count_bits(data, 64, 0) == 0
    assert _core.or_bits(data, 64, bytes(8), 64, 0) == 0
    assert pairs(_core.take_set(data, 64, 0)) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda data: _core.set_ranges(data, 1, 0, 0, words([0]), 1, True),
        lambda data: _core.set_ranges(data, 0, 63, 0, bytes(9), 1, True),  # type: ignore[arg-type]
        lambda data: _core.set_ranges(data, 0, 63, 0, words([0]), words([1, 1]), True),
        lambda data: _core.or_pages(data, 0, 64, data, 0, 0, 0, 1),
        lambda data: _core.or_pages(data, 0, 0, data, 0, 64, 0, 1),
        lambda data: _core.or_pages(data, 0, 0, data, 0, 0, 2, 1),
        lambda data: _core.or_pages(data, 1, 12, data, 0, 12, PAGE - 1, PAGE),
        lambda data: _core.or_pages(data, 0, 12, data, 1, 12, PAGE - 1, PAGE),
        lambda data: _core.or_pages(data, 0, 0, bytes(9), 0, 0, 0, 64),
        lambda data: _core.or_pages(data, 0, 0, bytes(7), 0, 0, 0, 63),
        lambda data: _core.differing_pages(bytes(8), bytes(8), 0, data),
        lambda data: _core.differing_pages(bytes(8), bytes(8), -1, data),
        lambda data: _core.differing_pages(b"\1" * 9, None, 2, data),
    ],
)
def test_arguments_that_do_not_fit_are_refused_and_nothing_is_written(
    call: Callable[[bytearray], object],
) -> None:
    data = bytearray(8)
    with pytest.raises(ValueError, match=r"set_ranges|or_pages|differing_pages"):
        call(data)
    assert not any(data)


def test_arguments_at_their_limits_are_accepted() -> None:
    data = bytearray(8)
    assert _core.set_ranges(data, 63, 63, 0, words([63]), 1, True) == 1
    data[0] = 0
    assert _core.or_pages(data, 1, 12, b"\1", 1, 12, PAGE, PAGE) == 1
    assert _core.or_pages(data, 0, 0, bytes(8), 0, 0, 63, 63) == 0
    assert _core.differing_pages(b"", b"", 1, data) == 0
    assert _core.differing_pages(bytes(64), b"\1" * 64, 1, data) == 64


def test_memory_is_released_after_success_and_after_an_error() -> None:
    """A bytearray cannot be resized while a call holds it."""
    data, table, source = bytearray(8), bytearray(PAGE), bytearray(8)
    calls: list[Callable[[], object]] = [
        lambda: _core.set_bits(data, 0, 1),
        lambda: _core.set_bits(data, 0, 99),
        lambda: _core.set_ranges(data, 0, 63, 0, source, source, True),  # type: ignore[arg-type]
        lambda: _core.set_ranges(data, 0, 64, 0, source, source, True),  # type: ignore[arg-type]
        lambda: _core.or_bits(data, 0, source, 0, 1),
        lambda: _core.or_bits(data, 0, source, 0, 99),
        lambda: _core.or_pages(data, 0, 0, source, 0, 0, 0, 1),
        lambda: _core.or_pages(data, 0, 0, source, 0, 0, 0, 99),
        lambda: _core.take_set(data, 0, 1),
        lambda: _core.take_set(data, 0, 99),
        lambda: _core.count_bits(data, 0, 1),
        lambda: _core.count_bits(data, 0, 99),
        lambda: _core.mark_table(table, amd(1), 0, 0),
        lambda: _core.mark_table(table, amd(0), 0, 0),
        lambda: _core.read_table(table, amd(1), 0, 0, True),
        lambda: _core.read_table(table, amd(0), 0, 0, True),
        lambda: _core.differing_pages(data, source, 1, table),
        lambda: _core.differing_pages(data, source, 3, table),
    ]
    for call in calls:
        with suppress(ValueError):
            call()
        for held in (data, table, source):
            held.append(0)
            held.pop()


def test_the_default_of_shared_sets_the_same_bits() -> None:
    """Without `shared`, the results and the bits are the same as with True."""
    data, source = bytearray(8), b"\xf0" * 8
    assert _core.set_bits(data, 0, 5) == 5
    assert _core.or_bits(data, 0, source, 0, 64) == 31
    assert _core.or_pages(data, 0, 0, b"\xff" * 8, 0, 0, 0, 63) == 28
    assert data == b"\xff" * 8


def test_a_fence_returns_none() -> None:
    assert _core.fence() is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("length", [-1, 1 << 64])
@pytest.mark.parametrize("iovas", [[], [0]])
def test_a_length_outside_64_bits_is_refused(iovas: list[int], length: int) -> None:
    data = bytearray(8)
    with pytest.raises(OverflowError):
        _core.set_ranges(data, 0, 63, 0, words(iovas), length, True)
    assert not any(data)
