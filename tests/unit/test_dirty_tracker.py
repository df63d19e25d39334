"""One conformance suite for all dirty trackers, and tests of the peculiarities of each."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from dmaproof.dirty_tracker import EmulatedTracker, emulated_trackers
from dmaproof.dirty_tracker.address_queue import AddressQueue
from dmaproof.dirty_tracker.amd_iommu import AmdIommu
from dmaproof.dirty_tracker.coarse import Coarse
from dmaproof.dirty_tracker.dirty_ring import DirtyRing
from dmaproof.dirty_tracker.intel_iommu import IntelIommu
from dmaproof.dirty_tracker.page_set import combine_ranges
from dmaproof.dirty_tracker.page_table import EntryFormat, PageTable
from dmaproof.dirty_tracker.sequence_pair import SequencePair
from dmaproof.errors import TrackerError
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.units import div_ceil

K, M, G = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * K
LOW, HIGH = IovaRange(0, 4 * M), IovaRange(1 << 32, 64 * M)


@dataclass(frozen=True)
class Kind:
    """A tracker, and the size in bytes of the page that it records for an IOVA."""

    make: Callable[[], EmulatedTracker]
    page_bytes: Callable[[int], int] = lambda iova: PAGE


KINDS = {
    "amd": Kind(AmdIommu),
    "amd-64K": Kind(lambda: AmdIommu((4 * K, 64 * K)), lambda iova: 64 * K),
    "amd-2M": Kind(lambda: AmdIommu((4 * K, 2 * M)), lambda iova: 2 * M),
    "amd-32M": Kind(
        lambda: AmdIommu((4 * K, 2 * M, 32 * M)), lambda iova: 2 * M if iova < 4 * M else 32 * M
    ),
    "intel": Kind(IntelIommu),
    "intel-2M": Kind(lambda: IntelIommu((4 * K, 2 * M)), lambda iova: 2 * M),
    "queue": Kind(AddressQueue),
    "pairs": Kind(SequencePair),
    "ring": Kind(DirtyRing),
    "ring-of-7": Kind(lambda: DirtyRing(ring_entries=7)),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def dirty(tracker: EmulatedTracker, iova: int, length: int) -> set[int]:
    """Read and clear; return the numbers of the 4 KiB pages that are reported."""
    words = np.zeros(div_ceil(length, PAGE) // 64 + 2, dtype=np.uint64)
    with IovaBitmap(iova, length, PAGE, words) as bitmap:
        bitmap.for_each(tracker.read_and_clear)
        return {
            page
            for start, size in bitmap.ranges()
            for page in range(start // PAGE, (start + size - 1) // PAGE + 1)
        }


def pages_of(kind: Kind, iova: int, length: int) -> set[int]:
    """Return the 4 KiB pages that a write dirties in a tracker of this kind."""
    found: set[int] = set()
    for page in range(iova // PAGE, (iova + length - 1) // PAGE + 1):
        size = kind.page_bytes(page * PAGE) // PAGE
        found |= set(range(page // size * size, page // size * size + size))
    return found


def pages_in(iova: int, length: int) -> set[int]:
    return set(range(iova // PAGE, (iova + length - 1) // PAGE + 1))


def test_every_tracker_but_the_coarse_one_is_in_this_suite() -> None:
    """The coarse tracker reports unwritten pages; its own test is at the end."""
    tested = {type(kind.make()) for kind in KINDS.values()}
    assert tested == set(emulated_trackers().values()) - {Coarse}


# Every tracker ----------------------------------------------------------------------------------


@every_kind
def test_a_write_is_reported_once(kind: Kind) -> None:
    tracker = kind.make()
    tracker.start([LOW, HIGH], PAGE)
    writes = [(0, 1), (PAGE - 1, 2), (3 * M + 17, 3 * PAGE), (4 * M - 1, 1)]
    high_writes = [(HIGH.iova + 5 * PAGE, PAGE), (HIGH.iova + 63 * M, M)]
    for write in writes + high_writes:
        tracker.dma(*write)
    assert dirty(tracker, *LOW) == set().union(*(pages_of(kind, *write) for write in writes))
    assert dirty(tracker, *HIGH) == set().union(*(pages_of(kind, *write) for write in high_writes))
    assert dirty(tracker, *LOW) == dirty(tracker, *HIGH) == set()


@every_kind
def test_a_repeated_write_is_reported_again(kind: Kind) -> None:
    tracker = kind.make()
    tracker.start([LOW], PAGE)
    for _ in range(3):
        for _ in range(2):
            tracker.dma(M, 1)
        assert dirty(tracker, *LOW) == pages_of(kind, M, 1)
    assert dirty(tracker, *LOW) == set()


@every_kind
@pytest.mark.parametrize("piece", [PAGE, 3 * PAGE, 100 * K, 3 * M, 2049 * K + 1])
def test_queries_in_pieces_report_the_same_pages_as_one_query(kind: Kind, piece: int) -> None:
    tracker = kind.make()
    tracker.start([LOW, HIGH], PAGE)
    rng = np.random.default_rng(piece)
    writes = [
        (int(rng.integers(0, LOW.length - 9000)), int(rng.integers(1, 9000))) for _ in range(50)
    ]
    for write in writes:
        tracker.dma(*write)
    found: set[int] = set()
    for start in range(0, LOW.length, piece):
        length = min(piece, LOW.length - start)
        reported = dirty(tracker, start, length)
        assert reported <= pages_in(start, length)
        found |= reported
    assert found == set().union(*(pages_of(kind, *write) for write in writes))
    # Pages across the edges of the pieces may be reported again as a whole, and no others.
    assert dirty(tracker, *LOW) <= found
    assert dirty(tracker, *LOW) == set()


@every_kind
def test_a_page_is_forgotten_only_after_a_query_of_the_whole_page(kind: Kind) -> None:
    tracker = kind.make()
    tracker.start([LOW], PAGE)
    tracker.dma(2 * M + 5, 1)
    page = kind.page_bytes(2 * M)
    assert dirty(tracker, 2 * M, page - 1) == pages_in(2 * M, page - 1)
    assert dirty(tracker, 2 * M + page - 1, 1) == pages_in(2 * M + page - 1, 1)
    assert dirty(tracker, *LOW) == pages_in(2 * M, page)
    assert dirty(tracker, *LOW) == set()


@every_kind
def test_queries_outside_the_ranges_report_nothing(kind: Kind) -> None:
    tracker = kind.make()
    tracker.start([IovaRange(0, 2 * M), IovaRange(6 * M, 2 * M)], PAGE)
    tracker.dma(6 * M, 1)
    tracker.dma(100 * M, 1)  # hardware would refuse this write; no tracker may fail on it
    assert dirty(tracker, 3 * M, M) == set()
    found = dirty(tracker, 0, 64 * M)
    assert 6 * M // PAGE in found
    assert found <= pages_in(6 * M, 2 * M)


@every_kind
def test_no_write_is_recorded_while_tracking_is_off(kind: Kind) -> None:
    tracker = kind.make()
    tracker.dma(0, PAGE)
    tracker.start([LOW], PAGE)
    assert dirty(tracker, *LOW) == set()
    tracker.dma(0, PAGE)
    tracker.stop()
    tracker.stop()
    tracker.dma(PAGE, PAGE)
    tracker.start([LOW], PAGE)
    assert dirty(tracker, *LOW) == set()


@pytest.mark.parametrize("make", emulated_trackers().values(), ids=emulated_trackers())
def test_calls_in_the_wrong_order_are_refused(make: Callable[[], EmulatedTracker]) -> None:
    tracker = make()
    with pytest.raises(TrackerError, match="start first"):
        dirty(tracker, *LOW)
    tracker.start([LOW], PAGE)
    with pytest.raises(TrackerError, match="already"):
        tracker.start([LOW], PAGE)


@pytest.mark.parametrize("make", emulated_trackers().values(), ids=emulated_trackers())
@pytest.mark.parametrize(
    "ranges",
    [
        [IovaRange(0, 0)],
        [IovaRange((1 << 64) - PAGE, 2 * PAGE)],
        [IovaRange(0, 2 * PAGE), IovaRange(PAGE, PAGE)],
    ],
)
def test_invalid_ranges_are_refused(
    make: Callable[[], EmulatedTracker], ranges: list[IovaRange]
) -> None:
    tracker = make()
    with pytest.raises(TrackerError):
        tracker.start(ranges, PAGE)
    tracker.start([LOW], PAGE)  # works, so the failed attempts left no state


@every_kind
def test_more_ranges_than_the_hardware_has_lose_no_page(kind: Kind) -> None:
    """Trackers combine more ranges than most hardware has, and still report every write."""
    ranges = [IovaRange(index * 16 * M, 2 * M) for index in range(64)]
    tracker = kind.make()
    tracker.start(ranges, PAGE)
    for start, length in ranges:
        tracker.dma(start + length - 1, 1)
    for start, length in ranges:
        assert pages_in(start + length - 1, 1) <= dirty(tracker, start, length)
    for start, length in ranges:
        assert dirty(tracker, start, length) == set()


@every_kind
def test_a_write_across_the_edges_of_a_range_is_recorded_only_inside(kind: Kind) -> None:
    tracker = kind.make()
    tracker.start([IovaRange(4 * M, 4 * M)], PAGE)
    tracker.dma(4 * M - PAGE, PAGE)
    tracker.dma(8 * M, PAGE)
    assert dirty(tracker, 0, 16 * M) == set()
    tracker.dma(4 * M - 1, 2)
    tracker.dma(8 * M - 1, 2)
    found = dirty(tracker, 0, 16 * M)
    assert {4 * M // PAGE, 8 * M // PAGE - 1} <= found <= pages_in(4 * M, 4 * M)


@pytest.mark.parametrize("make", [AddressQueue, SequencePair, DirtyRing])
def test_a_range_includes_a_page_of_which_it_has_one_byte(
    make: Callable[[], EmulatedTracker],
) -> None:
    tracker = make()
    tracker.start([IovaRange(8 * PAGE - 1, PAGE + 2)], PAGE)
    tracker.dma(6 * PAGE, 8 * PAGE)
    assert dirty(tracker, *LOW) == {7, 8, 9}


@pytest.mark.parametrize("make", [lambda: AddressQueue(least_page_size=1), SequencePair, DirtyRing])
def test_pages_of_one_byte_are_tracked_in_the_upper_half_of_the_address_space(
    make: Callable[[], EmulatedTracker],
) -> None:
    base = (1 << 63) + 100
    tracker = make()
    tracker.start([IovaRange(base, 64)], 1)
    tracker.dma(base + 3, 5)
    with IovaBitmap(base, 64, 1, bytearray(8)) as bitmap:
        bitmap.for_each(tracker.read_and_clear)
        assert list(bitmap.ranges()) == [(base + 3, 5)]


@pytest.mark.parametrize("make", [AddressQueue, SequencePair])
def test_the_ninth_range_closes_the_smallest_gap(make: Callable[[], EmulatedTracker]) -> None:
    """The hardware watches eight ranges; it reports a write in the closed gap but in no other."""
    ranges = [IovaRange(index * M, PAGE) for index in range(8)]
    ninth = IovaRange(5 * M + 2 * PAGE, PAGE)
    for watched, expected in ((ranges, set[int]()), ([*ranges, ninth], {5 * M // PAGE + 1})):
        tracker = make()
        tracker.start(watched, PAGE)
        tracker.dma(5 * M + PAGE, PAGE)
        tracker.dma(6 * M + PAGE, PAGE)
        assert dirty(tracker, 0, 16 * M) == expected


@every_kind
def test_a_write_at_the_top_of_the_address_space_is_reported(kind: Kind) -> None:
    top = (1 << 48 if isinstance(kind.make(), IntelIommu) else 1 << 64) - 32 * M
    tracker = kind.make()
    tracker.start([IovaRange(top, 32 * M)], PAGE)
    tracker.dma(top + 32 * M - 1, 1)
    words = np.zeros(32 * M // PAGE // 64, dtype=np.uint64)
    with IovaBitmap(top, 32 * M, PAGE, words) as bitmap:
        bitmap.for_each(tracker.read_and_clear)
        assert words[-1] >> np.uint64(63) == 1
        *_, (start, length) = bitmap.ranges()
        assert start + length == top + 32 * M


# Combining ranges -------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 8, 30])
def test_combined_ranges_cover_all_and_close_the_smallest_gaps(most: int) -> None:
    rng = np.random.default_rng(most)
    edges = np.cumsum(rng.integers(1, 100, 40)).tolist()
    ranges = [IovaRange(start, end - start) for start, end in zip(edges[::2], edges[1::2])]  # noqa: B905
    combined = combine_ranges(ranges[::-1], most)
    assert len(combined) == min(most, len(ranges))
    for start, length in ranges:
        assert any(low <= start and start + length <= low + size for low, size in combined)
    gaps = sorted(high[0] - low[0] - low[1] for low, high in itertools.pairwise(ranges))
    left = [high[0] - low[0] - low[1] for low, high in itertools.pairwise(combined)]
    assert sum(left) == sum(gaps[len(gaps) - len(left) :])


def test_ranges_that_meet_do_not_overlap() -> None:
    ranges = [IovaRange(0, PAGE), IovaRange(PAGE, 1), IovaRange(3 * PAGE, PAGE)]
    assert combine_ranges(ranges, 3) == ranges
    assert combine_ranges(ranges, 2) == [IovaRange(0, PAGE + 1), IovaRange(3 * PAGE, PAGE)]


def test_no_ranges_are_combined_to_no_ranges() -> None:
    assert combine_ranges([], 8) == []


# IOMMU page tables ------------------------------------------------------------------------------


def table_with(*page_sizes: int) -> PageTable:
    table = PageTable(AmdIommu.form, page_sizes)
    table.map(0, 4 * G)
    return table


def collect(table: PageTable, iova: int, length: int, *, clear: bool = True) -> list[IovaRange]:
    with IovaBitmap(iova, length, PAGE, np.zeros(length // PAGE // 64 + 1, np.uint64)) as bitmap:
        table.collect(bitmap, iova, length, clear=clear)
        return list(bitmap.ranges())


@pytest.mark.parametrize("form", [AmdIommu.form, IntelIommu.form])
def test_memory_is_mapped_with_the_largest_pages_that_fit(form: object) -> None:
    table = PageTable(form, (4 * K, 2 * M, G))  # type: ignore[arg-type]
    table.map(G - 2 * M - PAGE, 2 * G)
    sizes = [
        table.page_at(iova)
        for iova in (G - 2 * M - PAGE, G - 2 * M, G, 2 * G - 1, 2 * G, 3 * G - 2 * M - PAGE - 1)
    ]
    assert sizes == [
        (G - 2 * M - PAGE, PAGE),
        (G - 2 * M, 2 * M),
        (G, G),
        (G, G),
        (2 * G, 2 * M),
        (3 * G - 2 * M - 2 * PAGE, PAGE),
    ]
    assert table.page_at(G - 2 * M - PAGE - 1) is None
    assert table.page_at(3 * G - 2 * M - PAGE) is None


@pytest.mark.parametrize("size", [8 * K, 64 * K, M, 4 * M, 256 * M, 2 * G, 128 * G])
def test_contiguous_pages_are_one_page(size: int) -> None:
    table = PageTable(AmdIommu.form, (size,))
    table.map(0, 2 * size)
    table.mark(size + size // 2, 1)
    found = table.page_at(2 * size - 1)
    assert found == (size, size)
    with IovaBitmap(0, 2 * size, size, bytearray(8)) as bitmap:
        table.collect(bitmap, 0, 2 * size, clear=True)
        assert list(bitmap.ranges()) == [(size, size)]
    assert (table.entries & np.uint64(AmdIommu.form.dirty) == 0).all()


@pytest.mark.parametrize("end", [128 * K, 132 * K, 192 * K])
def test_contiguous_pages_begin_within_a_node_where_their_alignment_allows(end: int) -> None:
    table = PageTable(AmdIommu.form, (4 * K, 64 * K))
    table.map(60 * K, end - 60 * K)
    assert table.page_at(60 * K) == (60 * K, PAGE)
    assert table.page_at(64 * K) == (64 * K, 64 * K)
    last = 64 * K if end == 192 * K else PAGE if end == 132 * K else None
    assert table.page_at(128 * K) == (None if last is None else (128 * K, last))


@pytest.mark.parametrize(
    ("form", "size"),
    [
        pytest.param(IntelIommu.form, 64 * K, id="intel has no contiguous pages"),
        pytest.param(IntelIommu.form, 4 * K + 1, id="not a power of two"),
        pytest.param(AmdIommu.form, 12 * K, id="not a power of two of entries"),
        pytest.param(AmdIommu.form, 2 * K, id="smaller than an entry"),
        pytest.param(AmdIommu.form, 512 * G, id="more entries than half a node"),
    ],
)
def test_page_sizes_that_a_format_does_not_have(form: EntryFormat, size: int) -> None:
    with pytest.raises(TrackerError, match=f"no pages of {size:#x} bytes"):
        PageTable(form, (size,))


def test_entries_have_the_bits_of_the_specification() -> None:
    amd = PageTable(AmdIommu.form, (4 * K, 2 * M))
    amd.map(0, 2 * M + PAGE)
    amd.mark(0, 1)
    entries = amd.entries.tolist()
    assert 1 | 1 << 6 in entries  # a dirty 2 MiB page at 0: present, next level 0
    assert 2 * M | 1 in entries  # a 4 KiB page
    # Nodes of levels 1 to 5: next level in bits 9 to 11.
    assert {entry >> 9 & 7 for entry in entries} == {0, 1, 2, 3, 4, 5}
    shared = PageTable(AmdIommu.form, (64 * K,))
    shared.map(128 * K, 64 * K)
    # 16 entries of next level 7; the lowest zero bit of the address, 15, encodes the size.
    assert shared._nodes.ravel().tolist().count(128 * K | 0x7000 | 7 << 9 | 1) == 16
    intel = PageTable(IntelIommu.form, (4 * K, 2 * M))
    intel.map(0, 2 * M)
    intel.mark(0, 1)
    assert 3 | 1 << 7 | 1 << 9 in intel.entries.tolist()


def test_reading_without_clearing_changes_nothing() -> None:
    tracker = AmdIommu()
    tracker.start([LOW], PAGE)
    tracker.dma(5 * PAGE, PAGE)
    for _ in range(2):
        with IovaBitmap(*LOW, PAGE, bytearray(128)) as bitmap:
            bitmap.for_each(tracker.read)
            assert list(bitmap.ranges()) == [(5 * PAGE, PAGE)]
    assert dirty(tracker, *LOW) == {5}


def test_a_huge_page_that_is_split_keeps_every_part_dirty() -> None:
    table = table_with(4 * K, 2 * M, G)
    table.mark(G + 5, 1)
    table.resize(G, G, 2 * M)
    assert table.page_at(G + 3 * M) == (G + 2 * M, 2 * M)
    table.resize(G + 2 * M, 2 * M, 4 * K)
    assert collect(table, 0, 4 * G) == [(G, G)]
    table.mark(G + 2 * M + 5 * PAGE, 1)
    assert collect(table, 0, 4 * G) == [(G + 2 * M + 5 * PAGE, PAGE)]


def test_a_merged_page_is_dirty_if_a_part_was_dirty() -> None:
    table = table_with(4 * K)
    table.mark(2 * M + 7 * PAGE, 1)
    table.resize(0, G, G)
    assert table.page_at(5) == (0, G)
    assert collect(table, 0, 4 * G, clear=False) == [(0, G)]
    table.resize(0, G, 2 * M)
    assert collect(table, 0, 4 * G) == [(0, G)]
    assert collect(table, 0, 4 * G) == []


def test_a_part_of_a_page_cannot_be_resized() -> None:
    table = table_with(4 * K, 2 * M)
    for iova, length, size in [
        *((0, M, 4 * K), (M, M, 4 * K), (M, 2 * M, 4 * K), (0, 3, 3)),
        *((4 * G, 2 * M, 4 * K), (4 * G - 2 * M, 4 * M, 4 * K)),
    ]:
        with pytest.raises(TrackerError, match="does not consist of whole mapped pages"):
            table.resize(iova, length, size)
    table.resize(0, 2 * M, 4 * K)


def test_a_refused_resize_changes_nothing() -> None:
    table = PageTable(AmdIommu.form)
    table.map(2 * M, 4 * M)
    table.map(8 * M, 2 * M)
    table.mark(0, 16 * M)
    for iova, length, size in [
        (0, 4 * M, 4 * K),  # begins before the mapped range
        (2 * M, 8 * M, 4 * K),  # has a hole
        (2 * M + PAGE, 2 * M, 2 * M),
        (2 * M, M, 2 * M),
    ]:
        with pytest.raises(TrackerError, match="does not consist of whole mapped pages"):
            table.resize(iova, length, size)
        assert collect(table, 0, 16 * M, clear=False) == [(2 * M, 4 * M), (8 * M, 2 * M)]


def test_neighbours_of_merged_pages_stay_mapped_and_dirty() -> None:
    table = PageTable(AmdIommu.form)
    table.map(0, 4 * M)
    table.mark(0, 4 * M)
    table.resize(64 * K, 64 * K, 64 * K)
    pages = [table.page_at(iova) for iova in (64 * K - 1, 64 * K, 128 * K - 1, 128 * K)]
    merged = (64 * K, 64 * K)
    assert pages == [(64 * K - PAGE, PAGE), merged, merged, (128 * K, PAGE)]
    assert collect(table, 0, 4 * M) == [(0, 4 * M)]


def test_repeated_splits_and_merges_take_no_more_memory() -> None:
    table = PageTable(AmdIommu.form)
    table.map(0, 8 * M)
    nodes = len(table._nodes)
    for size in [2 * M, 4 * K] * 10:
        table.resize(0, 8 * M, size)
    assert len(table._nodes) == nodes


@pytest.mark.parametrize(
    ("iova", "length", "message"),
    [
        (0, 0, "empty"),
        (0, 1, "whole pages of 0x1000 bytes"),
        (PAGE // 2, PAGE, "whole pages of 0x1000 bytes"),
        (0, PAGE + 1, "whole pages of 0x1000 bytes"),
    ],
)
def test_ranges_of_partial_pages_cannot_be_mapped(iova: int, length: int, message: str) -> None:
    with pytest.raises(TrackerError, match=message):
        PageTable(AmdIommu.form).map(iova, length)


@pytest.mark.parametrize(("form", "bits"), [(IntelIommu.form, 48), (AmdIommu.form, 64)])
def test_a_range_beyond_the_end_of_the_table_is_refused(form: EntryFormat, bits: int) -> None:
    PageTable(form).map((1 << bits) - PAGE, PAGE)
    for iova, length in ((1 << bits, PAGE), ((1 << bits) - PAGE, 2 * PAGE)):
        with pytest.raises(TrackerError, match="beyond"):
            PageTable(form).map(iova, length)


def test_a_run_of_pages_may_begin_within_one_node_and_end_within_the_next() -> None:
    table = PageTable(AmdIommu.form)
    table.map(M, 2 * M)
    pages = [table.page_at(iova) for iova in (M - 1, M, 2 * M - 1, 2 * M, 3 * M - 1, 3 * M)]
    starts = [None if page is None else page.iova for page in pages]
    assert starts == [None, M, 2 * M - PAGE, 2 * M, 3 * M - PAGE, None]


# The others -------------------------------------------------------------------------------------


def test_an_overflowing_queue_logs_a_warning_and_reports_every_page(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = AddressQueue(queue_entries=8)
    tracker.start([LOW], PAGE)
    tracker.dma(0, 9 * PAGE)
    with caplog.at_level(logging.WARNING):
        assert dirty(tracker, *LOW) == pages_in(*LOW)
    assert tracker.overflows == 1
    assert "overflowed" in caplog.text
    tracker.dma(0, 8 * PAGE)  # a full queue still reports single pages
    assert dirty(tracker, *LOW) == pages_in(0, 8 * PAGE)
    assert tracker.overflows == 1


def test_a_queue_uses_a_page_size_that_its_device_supports() -> None:
    tracker = AddressQueue(least_page_size=16 * K, greatest_page_size=64 * K)
    assert tracker.start([LOW], 4 * K) == 16 * K
    tracker.dma(17 * K, 1)
    assert dirty(tracker, *LOW) == {4, 5, 6, 7}
    tracker.stop()
    assert tracker.start([LOW], 2 * M) == 64 * K


def test_a_full_ring_stops_its_writer_and_loses_nothing() -> None:
    tracker = DirtyRing(ring_entries=4)
    tracker.start([LOW], PAGE)
    tracker.dma(0, 10 * PAGE)
    assert tracker.full_exits == 2
    assert dirty(tracker, *LOW) == set(range(10))


def test_a_ring_of_the_default_size_stops_its_writer_at_page_65537() -> None:
    tracker = DirtyRing()
    tracker.start([HIGH, IovaRange(2 * HIGH.iova, G)], PAGE)
    tracker.dma(2 * HIGH.iova, 65536 * PAGE)
    assert tracker.full_exits == 0
    tracker.dma(HIGH.iova, 1)
    assert tracker.full_exits == 1


def test_a_page_enters_the_ring_only_once() -> None:
    tracker = DirtyRing(ring_entries=4)
    tracker.start([LOW], PAGE)
    for _ in range(100):
        tracker.dma(0, 2 * PAGE)
    assert tracker.full_exits == 0


def test_neighbours_in_a_queried_word_stay_dirty() -> None:
    """pds transfers whole words; only the queried pages may be acknowledged."""
    tracker = SequencePair()
    tracker.start([LOW], PAGE)
    tracker.dma(0, 64 * PAGE)
    assert dirty(tracker, 10 * PAGE, 5 * PAGE) == set(range(10, 15))
    assert dirty(tracker, *LOW) == set(range(64)) - set(range(10, 15))


def test_the_coarse_tracker_always_reports_every_mapped_page() -> None:
    tracker = Coarse()
    tracker.start([LOW, HIGH], PAGE)
    for _ in range(2):
        assert dirty(tracker, *LOW) == pages_in(*LOW)
    assert dirty(tracker, LOW.length, HIGH.iova - LOW.length) == set()


@pytest.mark.parametrize("make", [AddressQueue, SequencePair, DirtyRing])
@pytest.mark.parametrize("page_size", [0, 3, 0x3000, 1 << 64])
def test_page_sizes_that_are_not_powers_of_two_are_refused(
    make: Callable[[], EmulatedTracker], page_size: int
) -> None:
    with pytest.raises(TrackerError, match="power of two"):
        make().start([LOW], page_size)
