"""The set of pages that trackers share: exact at both ends of every range."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof.dirty_tracker.address_queue import AddressQueue
from dmaproof.dirty_tracker.coarse import Coarse
from dmaproof.dirty_tracker.dirty_ring import DirtyRing
from dmaproof.dirty_tracker.page_set import PageSet, page_shift
from dmaproof.errors import TrackerError
from dmaproof.iova_bitmap import IovaBitmap, IovaRange

PAGE = 4096
RANGES = [IovaRange(4 * PAGE, 70 * PAGE), IovaRange(100 * PAGE, 3 * PAGE)]
"""Pages 4 to 73, more than one word of bits, and pages 100 to 102."""
PAGES = [*range(4, 74), *range(100, 103)]


def dirty(bitmap: IovaBitmap) -> list[int]:
    return [
        page
        for iova, length in bitmap.ranges()
        for page in range(iova // PAGE, (iova + length) // PAGE)
    ]


def reported(pages: PageSet, first: int = 0, count: int = 128) -> list[int]:
    with IovaBitmap(0, 128 * PAGE, PAGE, bytearray(16)) as bitmap:
        pages.report(bitmap, first * PAGE, count * PAGE)
        return dirty(bitmap)


def numbers(*pages: int) -> NDArray[np.uint64]:
    return np.array(pages, dtype=np.uint64)


def test_a_set_holds_pages_from_the_first_to_the_last_of_each_range() -> None:
    pages = PageSet(RANGES, PAGE)
    pages.add_pages(numbers(3, 4, 73, 74, 99, 100, 102, 103))
    assert reported(pages) == [4, 73, 100, 102]
    assert reported(pages) == []


def test_add_all_adds_every_page_of_the_ranges() -> None:
    pages = PageSet(RANGES, PAGE)
    pages.add_all()
    assert reported(pages) == PAGES


@pytest.mark.parametrize("page", [4, 5, 67, 68, 73, 100, 102])
def test_only_the_given_page_is_removed(page: int) -> None:
    pages = PageSet(RANGES, PAGE)
    pages.add_all()
    pages.remove_pages(numbers(3, page, 74, 103))
    assert reported(pages) == [other for other in PAGES if other != page]


def test_a_page_just_after_a_range_of_whole_words_is_ignored() -> None:
    pages = PageSet([IovaRange(0, 64 * PAGE)], PAGE)
    pages.add_all()
    for change in (pages.add_pages, pages.remove_pages):
        change(numbers(64))
        assert pages.inside(0, 128 * PAGE) == [(0, 64)]
        assert pages.missing(0, 128 * PAGE) == []


def test_missing_pages_are_found_in_every_range() -> None:
    pages = PageSet(RANGES, PAGE)
    pages.add_run(5, 2)
    pages.add_run(101, 1)
    assert pages.inside(0, 128 * PAGE) == [(4, 70), (100, 3)]
    assert pages.missing(0, 128 * PAGE) == [(4, 1), (7, 67), (100, 1), (102, 1)]
    assert pages.missing(5 * PAGE, 2 * PAGE) == []
    assert pages.inside(74 * PAGE, PAGE) == pages.inside(99 * PAGE, PAGE) == []


def test_ranges_that_share_a_page_or_meet_are_merged_and_others_are_not() -> None:
    ranges = [
        *(IovaRange(PAGE, 10), IovaRange(PAGE + 20, PAGE)),
        IovaRange(4 * PAGE, PAGE),
        *(IovaRange(6 * PAGE, 1), IovaRange(6 * PAGE + 1, PAGE), IovaRange(8 * PAGE, 1)),
        IovaRange(10 * PAGE, PAGE + 1),
    ]
    pages = PageSet(ranges, PAGE)
    assert pages.inside(0, 128 * PAGE) == [(1, 2), (4, 1), (6, 3), (10, 2)]
    pages.add_all()
    assert reported(pages) == [1, 2, 4, 6, 7, 8, 10, 11]


def test_a_page_may_be_half_the_address_space() -> None:
    assert [page_shift(1 << bits) for bits in (0, 12, 63)] == [0, 12, 63]


def test_a_full_queue_loses_no_page_and_one_page_more_overflows_it() -> None:
    queue = AddressQueue(queue_entries=6)
    assert queue.start(RANGES, PAGE) == PAGE
    for overflows in (1, 2):
        queue.dma(10 * PAGE, 2 * PAGE)
        queue.dma(20 * PAGE, 4 * PAGE)
        with IovaBitmap(0, 128 * PAGE, PAGE, bytearray(16)) as bitmap:
            queue.read_and_clear(bitmap, 0, 128 * PAGE)
            assert dirty(bitmap) == [10, 11, 20, 21, 22, 23]
        assert queue.overflows == overflows - 1
        queue.dma(10 * PAGE, 4 * PAGE)
        queue.dma(20 * PAGE, 3 * PAGE)
        with IovaBitmap(0, 128 * PAGE, PAGE, bytearray(16)) as bitmap:
            queue.read_and_clear(bitmap, 0, 128 * PAGE)
            assert dirty(bitmap) == PAGES
        assert queue.overflows == overflows


def test_an_overflow_before_a_stop_is_forgotten() -> None:
    queue = AddressQueue(queue_entries=1)
    queue.start(RANGES, PAGE)
    queue.dma(10 * PAGE, 2 * PAGE)
    queue.stop()
    queue.start(RANGES, PAGE)
    with IovaBitmap(0, 128 * PAGE, PAGE, bytearray(16)) as bitmap:
        queue.read_and_clear(bitmap, 0, 128 * PAGE)
        assert dirty(bitmap) == []
    assert queue.overflows == 0


def test_a_ring_that_is_exactly_full_does_not_stop_its_writer() -> None:
    ring = DirtyRing(ring_entries=4)
    ring.start(RANGES, PAGE)
    ring.dma(10 * PAGE, 4 * PAGE)
    assert ring.full_exits == 0
    ring.dma(10 * PAGE, 5 * PAGE)
    assert ring.full_exits == 1
    with IovaBitmap(0, 128 * PAGE, PAGE, bytearray(16)) as bitmap:
        ring.read_and_clear(bitmap, 0, 128 * PAGE)
        assert dirty(bitmap) == [10, 11, 12, 13, 14]


def test_the_coarse_tracker_reports_mapped_pages_until_it_is_stopped() -> None:
    coarse = Coarse()
    coarse.start(RANGES, PAGE)
    with IovaBitmap(0, 128 * PAGE, PAGE, bytearray(16)) as bitmap:
        coarse.read_and_clear(bitmap, 6 * PAGE, 95 * PAGE)
        assert dirty(bitmap) == [*range(6, 74), 100]
        coarse.stop()
        with pytest.raises(TrackerError, match="call start first"):
            coarse.read_and_clear(bitmap, 0, PAGE)
    assert coarse.start(RANGES, PAGE) == PAGE
