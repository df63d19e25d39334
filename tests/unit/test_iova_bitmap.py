"""The rules of the kernel's iova_bitmap, one by one: those dmaproof keeps, and those it breaks.

docs/iterator.md names these tests. The cases come from the bugs that were fixed in the kernel's
iova_bitmap after its merge, from the checks of its callers, and from iommufd's self-tests.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmaproof import _core
from dmaproof.errors import BitmapError
from dmaproof.iova_bitmap import ADDRESS_SPACE, WINDOW_BYTES, IovaBitmap, IovaRange
from dmaproof.units import div_ceil

K, M, G, T = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = 4 * K
WINDOW = WINDOW_BYTES * 8 * PAGE
"""The bytes for which one window of bitmap stands: 64 GiB."""


def bits(data: Any) -> list[int]:
    content = np.frombuffer(bytes(data), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(content, bitorder="little")).tolist()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("bitmap")
    os.ftruncate(fd, 64 * M)
    yield fd
    os.close(fd)


def file_bits(fd: int, offset: int, length: int) -> list[int]:
    return bits(os.pread(fd, length, offset))


# Indices ----------------------------------------------------------------------------------------


def test_the_index_is_relative_to_the_base() -> None:
    data = bytearray(8)
    IovaBitmap(5 * PAGE, 64 * PAGE, PAGE, data).set(7 * PAGE, PAGE)
    assert bits(data) == [2]


def test_a_range_sets_every_page_it_touches() -> None:
    data = bytearray(8)
    IovaBitmap(0, 64 * PAGE, PAGE, data).set(PAGE - 1, PAGE + 2)
    assert bits(data) == [0, 1, 2]


def test_short_ranges_across_a_page_edge_set_both_pages() -> None:
    data = bytearray(8)
    with IovaBitmap(0, 64 * PAGE, PAGE, data) as bitmap:
        bitmap.set_many([PAGE - 1, 5 * PAGE - 1, 9 * PAGE], [2, PAGE, PAGE])
        bitmap.set_many([20 * PAGE + 1], PAGE)
    assert bits(data) == [0, 1, 4, 5, 9, 20, 21]


def test_a_base_inside_a_page_does_not_shift_the_pages() -> None:
    """The kernel counts from the base, so one page may set two bits; iommufd requires alignment."""
    data = bytearray(8)
    IovaBitmap(PAGE // 2, 3 * PAGE, PAGE, data).set(PAGE, PAGE)
    assert bits(data) == [1]


def test_bits_that_are_already_set_stay_set() -> None:
    data = bytearray(b"\xf0" * 8)
    IovaBitmap(0, 64 * PAGE, PAGE, data).set(0, 2 * PAGE)
    assert data == b"\xf3" + b"\xf0" * 7


def test_bytes_after_a_partial_word_are_not_touched() -> None:
    data = bytearray(16)
    bitmap = IovaBitmap(0, 65 * PAGE, PAGE, memoryview(data)[:9])
    bitmap.set(0, 65 * PAGE)
    assert bits(data) == list(range(65))


@pytest.mark.parametrize("length", [8 * K, 16 * K, 64 * K, 128 * K, 320 * K, 64 * M, 128 * M])
@pytest.mark.parametrize("offset", [0, 2048, 0xFF1])
def test_the_sizes_of_iommufds_self_tests_set_exactly_the_reported_bits(
    length: int, offset: int
) -> None:
    """Set every second page, twice, at aligned and odd addresses, with guard bytes around."""
    pages = length // PAGE
    whole = np.full(offset + pages // 8 + 4096, 0, dtype=np.uint8)
    data = whole[offset : offset + div_ceil(pages, 8)]
    base = 0x2000_0000
    with IovaBitmap(base, length, PAGE, data) as bitmap:
        iovas = base + np.arange(0, pages, 2, dtype=np.uint64) * np.uint64(PAGE)
        bitmap.set_many(iovas, PAGE)
        assert bitmap.stats.bits == len(iovas)
        bitmap.set_many(iovas, PAGE)
        assert bitmap.stats.bits == len(iovas)
    assert bits(data) == list(range(0, pages, 2))
    assert not whole[:offset].any()
    assert not whole[offset + len(data) :].any()


# Windows ----------------------------------------------------------------------------------------


def test_a_small_unaligned_bitmap_misses_no_page(file: int) -> None:
    """The kernel once skipped a part of such a range, and lost its dirty pages."""
    offset = mmap.PAGESIZE - 4
    with IovaBitmap(0, 64 * PAGE, PAGE, file, offset=offset) as bitmap:
        bitmap.set(0, 64 * PAGE)
    assert file_bits(file, offset, 8) == list(range(64))
    assert file_bits(file, 0, offset) == file_bits(file, offset + 8, 4096) == []


def test_a_range_across_a_window_edge_sets_bits_in_both_windows(file: int) -> None:
    with IovaBitmap(0, 2 * WINDOW, PAGE, file) as bitmap:
        bitmap.set(WINDOW - PAGE, 2 * PAGE)
        assert bitmap.stats.windows == 2
    edge = WINDOW_BYTES - 1
    assert file_bits(file, edge, 2) == [7, 8]


def test_a_range_of_a_tebibyte_sets_every_bit(file: int) -> None:
    """The kernel once recorded only half of a single entry of a huge page."""
    with IovaBitmap(0, T, PAGE, file) as bitmap:
        bitmap.set(0, T)
        assert bitmap.stats.windows == T // WINDOW
        assert bitmap.stats.bits == bitmap.count() == T // PAGE
        assert list(bitmap.ranges()) == [(0, T)]


def test_the_last_window_stays_mapped(file: int) -> None:
    with IovaBitmap(0, 4 * WINDOW, PAGE, file) as bitmap:
        for page in range(100):
            bitmap.set(WINDOW + page * PAGE, PAGE)
        assert (bitmap.stats.windows, bitmap.stats.pages) == (1, WINDOW_BYTES // mmap.PAGESIZE)
        assert bitmap.stats.ranges == 100


def test_scattered_ranges_map_a_window_each_unless_they_are_set_together(file: int) -> None:
    """With descending jumps the kernel pins each time: 1000 pins for 1000 sets."""
    jumps = [window * WINDOW + step * PAGE for step in range(20) for window in reversed(range(4))]
    with IovaBitmap(0, 4 * WINDOW, PAGE, file) as bitmap:
        for iova in jumps:
            bitmap.set(iova, PAGE)
        assert bitmap.stats.windows == len(jumps)
    with IovaBitmap(0, 4 * WINDOW, PAGE, file) as bitmap:
        bitmap.set_many(jumps, PAGE)
        assert bitmap.stats.windows == 4
        assert bitmap.stats.bits == 0  # the bits were already set


def test_a_mapped_buffer_of_any_size_is_one_window() -> None:
    with mmap.mmap(-1, 32 * M) as data:
        bitmap = IovaBitmap(0, T, PAGE, data)
        bitmap.set(T - PAGE, PAGE)
        bitmap.set(0, PAGE)
        assert (bitmap.stats.windows, bitmap.stats.pages) == (1, 32 * M // mmap.PAGESIZE)
        assert list(bitmap.windows()) == [(0, T)]
        bitmap.close()


def test_windows_are_pieces_of_the_range(file: int) -> None:
    start = PAGE * 3
    with IovaBitmap(start, 2 * WINDOW, PAGE, file) as bitmap:
        assert list(bitmap.windows()) == [
            IovaRange(start, WINDOW),
            IovaRange(start + WINDOW, WINDOW),
        ]


# Iterating --------------------------------------------------------------------------------------


def test_the_device_is_queried_once_for_the_whole_range() -> None:
    queries = []
    bitmap = IovaBitmap(M, 64 * PAGE, PAGE, bytearray(8))
    bitmap.for_each(lambda iterator, iova, length: queries.append((iterator, iova, length)))
    assert queries == [(bitmap, M, 64 * PAGE)]


def test_an_error_of_the_device_is_raised_and_earlier_bits_stay_set() -> None:
    data = bytearray(8)

    def fails_half_way(bitmap: IovaBitmap, iova: int, length: int) -> None:
        bitmap.set(iova, PAGE)
        raise OSError("the device has gone")

    with pytest.raises(OSError, match="gone"):
        IovaBitmap(0, 64 * PAGE, PAGE, data).for_each(fails_half_way)
    assert bits(data) == [0]


def test_ranges_are_merged_and_clipped() -> None:
    bitmap = IovaBitmap(PAGE // 2, 9 * PAGE, PAGE, bytearray(8))
    for iova in (PAGE // 2, PAGE, 5 * PAGE, 9 * PAGE):
        bitmap.set(iova, 1)
    assert list(bitmap.ranges()) == [
        (PAGE // 2, PAGE // 2 + PAGE),
        (5 * PAGE, PAGE),
        (9 * PAGE, PAGE // 2),
    ]


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, -4096, 3, 0x3000, 1 << 64])
def test_the_page_size_of_a_bitmap_must_be_a_power_of_two(page_size: int) -> None:
    with pytest.raises(BitmapError, match="power of two"):
        IovaBitmap(0, PAGE, page_size, bytearray(64))


def test_the_greatest_page_size_causes_no_division_by_zero() -> None:
    data = bytearray(1)
    IovaBitmap(1 << 63, 1 << 63, 1 << 63, data).set(ADDRESS_SPACE - 1, 1)
    assert bits(data) == [0]


@pytest.mark.parametrize(
    ("iova", "length"), [(0, 0), (-1, PAGE), (ADDRESS_SPACE - PAGE, PAGE + 1), (ADDRESS_SPACE, 1)]
)
def test_empty_ranges_and_ranges_beyond_64_bits_are_refused(iova: int, length: int) -> None:
    with pytest.raises(BitmapError, match="empty or leaves the 64-bit space"):
        IovaBitmap(iova, length, PAGE, bytearray(64))


def test_a_range_may_end_at_the_end_of_the_address_space() -> None:
    """As with iommufd; VFIO's LOGGING_START refuses it."""
    data = bytearray(1)
    bitmap = IovaBitmap(ADDRESS_SPACE - 8 * PAGE, 8 * PAGE, PAGE, data)
    bitmap.set(ADDRESS_SPACE - 1, 1)
    assert bits(data) == [7]
    assert list(bitmap.ranges()) == [(ADDRESS_SPACE - PAGE, PAGE)]


@pytest.mark.parametrize(
    ("iova", "length"),
    [
        pytest.param(9 * PAGE, 2 * PAGE, id="begins before: the kernel drops all of it"),
        pytest.param(15 * PAGE, 4 * PAGE, id="ends after: the kernel writes beyond the end"),
        pytest.param(0, 64 * PAGE, id="around"),
        pytest.param(18 * PAGE, PAGE, id="after"),
        pytest.param(10 * PAGE, 0, id="empty: the kernel may never end"),
        pytest.param(10 * PAGE, -PAGE, id="negative"),
        pytest.param(ADDRESS_SPACE - PAGE, 2 * PAGE, id="past 2**64"),
    ],
)
def test_a_report_outside_the_bitmap_is_an_error_and_sets_no_bit(iova: int, length: int) -> None:
    data = bytearray(8)
    bitmap = IovaBitmap(10 * PAGE, 8 * PAGE, PAGE, data)
    message = r"empty or not inside the bitmap's range 0xa000 \+ 0x8000"
    with pytest.raises(BitmapError, match=message):
        bitmap.set(iova, length)
    assert not any(data)
    assert bitmap.stats.ranges == 0


def test_one_bad_report_among_many_is_named_and_no_bit_is_set(file: int) -> None:
    for data, keywords in ((bytearray(8), {}), (file, {"window_bytes": mmap.PAGESIZE})):
        bitmap = IovaBitmap(0, 64 * PAGE, PAGE, data, **keywords)  # type: ignore[arg-type]
        with pytest.raises(BitmapError, match=r"range 1 \(IOVA 0x40000 \+ 0x1000\)"):
            bitmap.set_many([0, 64 * PAGE, 70 * PAGE], [PAGE, PAGE, PAGE])
        with pytest.raises(BitmapError, match="range 0"):
            bitmap.set_many([63 * PAGE + 1], PAGE)
        assert bitmap.count() == 0
        bitmap.close()


@pytest.mark.parametrize(
    ("iovas", "lengths", "message"),
    [
        ([0, 1], [1], r"IOVAs and lengths of one shape, got \(2,\) and \(1,\)"),
        ([[0]], [[1]], "one dimension"),
        ([-1], [1], "IOVAs"),
        (np.array([-1]), [1], "IOVAs of type int64"),
        (np.array([0.5]), [1], "IOVAs of type float64"),
        ([1 << 64], [1], "IOVAs"),
        ([0], [-1], "^lengths are not unsigned"),
        ([0], 0, "ranges of 0x0 bytes"),
        ([0], 1 << 65, "ranges of"),
        ([(15 << 60) + 1], 1 << 60, r"range 0 \(IOVA"),  # one byte too far
    ],
)
def test_values_that_are_not_addresses_are_refused(iovas: Any, lengths: Any, message: str) -> None:
    bitmap = IovaBitmap(0, ADDRESS_SPACE, 1 << 60, bytearray(2))
    with pytest.raises(BitmapError, match=message):
        bitmap.set_many(iovas, lengths)
    assert bitmap.count() == 0


def test_a_buffer_that_is_too_short_is_refused() -> None:
    for data in (bytearray(8), np.zeros(1, dtype=np.uint64), memoryview(bytearray(8))):
        with pytest.raises(BitmapError, match=r"65 pages need 9 bytes .* but the buffer has 8"):
            IovaBitmap(0, 65 * PAGE, PAGE, data)


def test_read_only_memory_is_refused(file: int) -> None:
    with pytest.raises(BitmapError, match="read-only"):
        IovaBitmap(0, 64 * PAGE, PAGE, memoryview(bytes(8)))
    reader = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    try:
        with pytest.raises(BitmapError, match="not open for reading and writing"):
            IovaBitmap(0, 64 * PAGE, PAGE, reader)
    finally:
        os.close(reader)


def test_memory_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(BitmapError, match="not a contiguous buffer"):
        IovaBitmap(0, 64 * PAGE, PAGE, np.zeros(32, dtype=np.uint8)[::2])


def test_files_that_cannot_hold_the_bitmap_are_refused(file: int) -> None:
    open_before = open_files()
    with pytest.raises(BitmapError, match="from offset 67108860 on, but the file has 67108864"):
        IovaBitmap(0, 64 * PAGE, PAGE, file, offset=64 * M - 4)
    with pytest.raises(BitmapError, match="file descriptor 9999 cannot hold a bitmap"):
        IovaBitmap(0, 64 * PAGE, PAGE, 9999)
    with pytest.raises(BitmapError, match="from offset -8"):
        IovaBitmap(0, 64 * PAGE, PAGE, file, offset=-8)
    for window_bytes in (100, 3 * mmap.PAGESIZE):
        with pytest.raises(BitmapError, match=f"a power of two, at least {mmap.PAGESIZE}"):
            IovaBitmap(0, 64 * PAGE, PAGE, file, window_bytes=window_bytes)
    assert open_files() == open_before


def test_use_of_a_closed_bitmap_is_an_error(file: int) -> None:
    for data in (bytearray(8), file):
        bitmap = IovaBitmap(0, 64 * PAGE, PAGE, data)
        bitmap.set(0, 1)
        bitmap.close()
        bitmap.close()
        with pytest.raises(BitmapError, match="closed"):
            bitmap.set(0, 1)
        with pytest.raises(BitmapError, match="closed"):
            bitmap.set_many([0], [1])
        with pytest.raises(BitmapError, match="closed"):
            list(bitmap.ranges())
        with pytest.raises(BitmapError, match="closed"):
            bitmap.count()


def test_a_closed_bitmap_releases_its_memory(file: int) -> None:
    open_before = open_files()
    data = bytearray(8)
    with IovaBitmap(0, 64 * PAGE, PAGE, data) as bitmap, IovaBitmap(0, T, PAGE, file) as other:
        bitmap.set(0, 1)
        other.set(0, 1)
    data.append(0)  # a buffer that is still exported cannot grow
    assert open_files() == open_before


# Many ranges in windows -------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0, 5 * PAGE, WINDOW - PAGE])
def test_set_many_around_a_window_edge_sets_the_same_bits_as_set(file: int, base: int) -> None:
    """Ranges that end before, at and after the edge, that begin at it, and that cross it."""
    small = mmap.PAGESIZE
    reach = small * 8 * PAGE
    edge = base + reach
    ranges = [
        *((edge - PAGE, PAGE - 1), (edge - PAGE, PAGE), (edge - PAGE, PAGE + 1)),
        *((edge - 1, 1), (edge - 1, 2), (edge, 1), (edge, PAGE)),
        *((edge + 9 * PAGE, 1), (base, 1), (edge - 3 * PAGE, 2 * reach), (edge + reach, PAGE)),
    ]
    for order in (ranges, ranges[::-1], *([alone] for alone in ranges)):
        os.pwrite(file, bytes(4 * small), 0)
        single = bytearray(4 * small)
        with IovaBitmap(base, 4 * reach, PAGE, single) as bitmap:
            for iova, length in order:
                bitmap.set(iova, length)
        with IovaBitmap(base, 4 * reach, PAGE, file, window_bytes=small) as windowed:
            windowed.set_many([iova for iova, _ in order], [length for _, length in order])
            assert windowed.stats.ranges == len(order)
        assert os.pread(file, 4 * small, 0) == bytes(single)


def test_only_a_range_across_an_edge_maps_both_windows(file: int) -> None:
    small = mmap.PAGESIZE
    edge = small * 8 * PAGE
    for iova, length, windows in ((edge - PAGE, PAGE, 1), (edge - PAGE, PAGE + 1, 2), (edge, 1, 1)):
        with IovaBitmap(0, 2 * edge, PAGE, file, window_bytes=small) as bitmap:
            bitmap.set_many([iova], [length])
            assert bitmap.stats.windows == windows


def test_a_single_length_applies_to_all_ranges() -> None:
    data = bytearray(8)
    with IovaBitmap(0, 64 * PAGE, PAGE, data) as bitmap:
        bitmap.set_many([3 * PAGE, 5 * PAGE - 1], 1)
        assert bitmap.page_size == PAGE
    assert bits(data) == [3, 4]


def test_signed_addresses_may_be_zero_but_not_negative() -> None:
    data = bytearray(8)
    with IovaBitmap(0, 64 * PAGE, PAGE, data) as bitmap:
        bitmap.set_many(np.array([0, PAGE], dtype=np.int64), PAGE)
        with pytest.raises(BitmapError, match="not unsigned 64-bit numbers"):
            bitmap.set_many(np.array([-PAGE], dtype=np.int64), PAGE)
    assert bits(data) == [0, 1]


def test_a_bitmap_may_end_where_its_file_ends() -> None:
    fd = os.memfd_create("bitmap")
    os.ftruncate(fd, 8)
    with IovaBitmap(0, 64 * PAGE, PAGE, fd) as bitmap:
        bitmap.set(63 * PAGE, PAGE)
    assert file_bits(fd, 0, 8) == [63]
    os.close(fd)


def test_addresses_may_have_any_integer_width() -> None:
    data = bytearray(8)
    with IovaBitmap(0, 64 * PAGE, PAGE, data) as bitmap:
        bitmap.set_many(np.array([PAGE, 5 * PAGE], dtype=np.uint32), PAGE)
        bitmap.set_many(np.array([9 * PAGE]), np.array([PAGE], dtype=np.uint16))
    assert bits(data) == [1, 5, 9]


@pytest.mark.parametrize(
    ("keywords", "atomics"), [({}, True), ({"shared": True}, True), ({"shared": False}, False)]
)
def test_bits_are_set_with_atomics_unless_there_is_a_single_writer(
    monkeypatch: pytest.MonkeyPatch, keywords: dict[str, bool], atomics: bool
) -> None:
    """The test checks the calls, because a lost race between two writers is too rare."""
    used = []

    def noted(function: Callable[..., int], *arguments: Any) -> int:
        used.append(arguments[-1])
        return function(*arguments)

    monkeypatch.setattr(_core, "set_bits", partial(noted, _core.set_bits))
    monkeypatch.setattr(_core, "set_ranges", partial(noted, _core.set_ranges))
    with IovaBitmap(0, 64 * PAGE, PAGE, bytearray(8), **keywords) as bitmap:
        bitmap.set(0, PAGE)
        bitmap.set_many([PAGE, 2 * PAGE], PAGE)
    assert used == [atomics, atomics]


# Several windows --------------------------------------------------------------------------------

SMALL = mmap.PAGESIZE
"""The smallest window, in bytes of bitmap."""
REACH = SMALL * 8 * PAGE
"""The bytes for which the smallest window stands."""


def test_each_window_is_mapped_once_for_any_order_of_the_ranges(file: int) -> None:
    """This includes ranges that end at a window's edge and do not continue in the next window."""
    pages = [window * REACH + at for window in (0, 2, 1, 2, 0, 1) for at in (REACH - PAGE, 0)]
    with IovaBitmap(0, 4 * REACH, PAGE, file, window_bytes=SMALL) as bitmap:
        bitmap.set_many(pages, PAGE)
        assert bitmap.stats.windows == 3
        assert bitmap.stats.bits == 6


def test_ranges_in_thousands_of_windows_set_their_bits(file: int) -> None:
    windows = [3001, 2049, 2050, 3001]
    os.ftruncate(file, 4000 * SMALL)
    with IovaBitmap(0, 4000 * REACH, PAGE, file, window_bytes=SMALL) as bitmap:
        bitmap.set_many([window * REACH + 5 * PAGE for window in windows], PAGE)
    for window in windows:
        assert file_bits(file, window * SMALL, SMALL) == [5]


def test_runs_are_merged_across_windows_and_later_runs_are_not_lost(file: int) -> None:
    base = 3 * PAGE
    edge = base + REACH
    with IovaBitmap(base, 2 * REACH, PAGE, file, window_bytes=SMALL) as bitmap:
        bitmap.set(edge - 2 * PAGE, 5 * PAGE)
        bitmap.set(edge + 10 * PAGE, PAGE)
        assert list(bitmap.ranges()) == [
            IovaRange(edge - 2 * PAGE, 5 * PAGE),
            IovaRange(edge + 10 * PAGE, PAGE),
        ]


def test_a_bitmap_may_end_with_its_file_inside_a_window() -> None:
    fd = os.memfd_create("bitmap")
    os.ftruncate(fd, SMALL + SMALL // 2)
    with IovaBitmap(0, 3 * REACH // 2, PAGE, fd, window_bytes=SMALL) as bitmap:
        bitmap.set(3 * REACH // 2 - PAGE, PAGE)
        assert list(bitmap.ranges()) == [IovaRange(3 * REACH // 2 - PAGE, PAGE)]
        assert bitmap.count() == 1
    os.close(fd)


def test_a_window_that_begins_inside_a_host_page_maps_one_page_more(file: int) -> None:
    with IovaBitmap(0, 2 * REACH, PAGE, file, offset=8, window_bytes=SMALL) as bitmap:
        bitmap.set(0, 2 * REACH)
        assert (bitmap.stats.windows, bitmap.stats.pages) == (2, 4)


def test_a_truncated_file_is_an_error_and_the_bitmap_can_still_be_closed() -> None:
    fd = os.memfd_create("bitmap")
    os.ftruncate(fd, 2 * SMALL)
    with IovaBitmap(0, 2 * REACH, PAGE, fd, window_bytes=SMALL) as bitmap:
        bitmap.set(0, PAGE)
        os.ftruncate(fd, SMALL)
        with pytest.raises(BitmapError, match="a window of the bitmap cannot be mapped"):
            bitmap.set(REACH, PAGE)
        bitmap.set(PAGE, PAGE)
        assert bitmap.stats.bits == 2
    os.close(fd)
