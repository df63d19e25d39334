"""The epochs of pages, and the link that lost a bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dmaproof.collector import Collector
from dmaproof.dirty_log import BufferDirtyLog, DirtyLog, Words
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.guest_memory import IovaMap, IovaMapping
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.trace import TRACED_LINKS, ChainTrace, Link, PageEpochs, TracedBitmap, set_bits
from qmp_tools.testbed.ring_driver import PAGE, guest_memory, ram_fd

LOW, HIGH = IovaRange(0x1000, 8 * PAGE), IovaRange(1 << 32, 4 * PAGE)


def test_pages_keep_their_last_epoch() -> None:
    pages = PageEpochs([LOW, HIGH])
    pages.see(0x1FFF, 2, 3)
    pages.see((1 << 32) + 3 * PAGE, PAGE, 4)
    pages.see(0x2000, 1, 5)
    assert [pages.last(0x1000 + index * PAGE) for index in range(3)] == [3, 5, 0]
    assert pages.last((1 << 32) + 3 * PAGE + 17) == 4
    assert pages.last(0xFFFF_FFFF) == 0
    assert pages.last(LOW.iova + LOW.length) == 0


def test_pages_outside_the_ranges_are_ignored() -> None:
    pages = PageEpochs([LOW])
    pages.see(0, 1 << 40, 1)
    assert (pages.array == 1).all()
    pages.see(1 << 40, PAGE, 2)
    pages.see(0x1000, 0, 2)
    assert (pages.array == 1).all()


def test_an_array_of_ranges_marks_the_same_pages_as_single_ranges() -> None:
    rng = np.random.default_rng(1)
    iovas = rng.integers(0, 16 * PAGE, 200).astype(np.uint64)
    lengths = rng.integers(1, 3 * PAGE, 200).astype(np.uint64)
    many, single = PageEpochs([LOW, HIGH]), PageEpochs([LOW, HIGH])
    many.see_many(iovas, lengths, 7)
    for iova, length in zip(iovas.tolist(), lengths.tolist(), strict=True):
        single.see(iova, length, 7)
    assert (many.array == single.array).all()


def test_see_many_marks_every_page_that_a_range_touches() -> None:
    """Each range is tested alone, so that no other range covers a missing page."""
    borders = [LOW.iova, LOW.iova + PAGE, LOW.iova + LOW.length, HIGH.iova, HIGH.iova + HIGH.length]
    for iova in [border + offset for border in borders for offset in (-2, -1, 0, 1)]:
        for length in (1, 2, 3, PAGE - 1, PAGE, PAGE + 1, PAGE + 2):
            many, single = PageEpochs([LOW, HIGH]), PageEpochs([LOW, HIGH])
            many.see_many(np.array([iova], np.uint64), np.array([length], np.uint64), 7)
            single.see(iova, length, 7)
            assert (many.array == single.array).all(), f"{length} bytes at {iova:#x}"


def test_a_set_bit_marks_the_page_of_its_position() -> None:
    pages = PageEpochs([LOW, HIGH])
    words = np.array([0b1010 << 60, 0b11], dtype=np.uint64)  # bits 61, 63, 64, 65
    pages.see_bits(0x2000, words, 60, 6, 9)
    assert [pages.last(0x2000 + index * PAGE) for index in range(6)] == [0, 9, 0, 9, 9, 9]


def test_bits_of_pages_outside_the_ranges_are_ignored() -> None:
    pages = PageEpochs([LOW, HIGH])
    words = np.full(2, (1 << 64) - 1, dtype=np.uint64)
    pages.see_bits(LOW.iova - PAGE, words, 3, 2, 1)
    assert pages.array.tolist() == [1, *[0] * 11]
    pages.see_bits(LOW.iova + 7 * PAGE, words, 3, 100, 2)
    assert pages.array.tolist() == [1, *[0] * 6, 2, *[0] * 4]
    pages.see_bits(HIGH.iova - PAGE, np.array([0b101000], dtype=np.uint64), 3, 100, 3)
    assert pages.array.tolist() == [1, *[0] * 6, 2, 0, 3, 0, 0]
    pages.see_bits(HIGH.iova + HIGH.length, words, 0, 4, 4)
    assert 4 not in pages.array


def test_set_bits_are_found_between_any_two_positions() -> None:
    rng = np.random.default_rng(2)
    words = rng.integers(0, 1 << 63, 5).astype(np.uint64)
    truth = np.unpackbits(words.view(np.uint8), bitorder="little")
    for first in range(0, 320, 7):
        for count in range(0, 320 - first, 13):
            assert (set_bits(words, first, count) == np.flatnonzero(truth[first:][:count])).all()


def test_new_ranges_keep_the_epochs_of_common_pages() -> None:
    pages = PageEpochs([LOW])
    pages.see(0x3000, PAGE, 2)
    moved = pages.covering([IovaRange(0x3000, 2 * PAGE), HIGH])
    assert moved.last(0x3000) == 2
    assert moved.last(0x4000) == 0
    assert moved.last(1 << 32) == 0


def test_pages_after_the_stop_do_not_count() -> None:
    trace = ChainTrace([LOW])
    words = np.array([0b11], dtype=np.uint64)
    for epoch, step in enumerate((lambda: None, trace.freeze, trace.thaw), 1):
        step()
        trace.epoch = epoch
        trace.see(Link.TRACKER, LOW.iova, PAGE)
        trace.see_many(Link.ITERATOR, np.array([LOW.iova], np.uint64), np.array([PAGE], np.uint64))
        trace.see_bits(Link.LOG, LOW.iova, words, 0, 2)
        seen = 1 if epoch == 2 else epoch
        for link in (Link.TRACKER, Link.ITERATOR, Link.LOG):
            assert trace.links[link].last(LOW.iova) == seen


def test_a_lookup_of_many_pages_equals_single_lookups() -> None:
    pages = PageEpochs([LOW, HIGH])
    pages.see(LOW.iova + PAGE, PAGE, 2)
    pages.see(HIGH.iova, PAGE, 3)
    numbers = [0, LOW.iova // PAGE + 1, HIGH.iova // PAGE, HIGH.iova // PAGE + 1, 1 << 40]
    numbers += [(each.iova + each.length) // PAGE for each in (LOW, HIGH)]  # just after
    found = pages.last_many(np.array(numbers, dtype=np.uint64))
    single = [pages.last(number * PAGE) for number in numbers]
    assert found.tolist() == single == [0, 2, 3, 0, 0, 0, 0]
    assert found.dtype == pages.array.dtype == np.uint32


@pytest.mark.parametrize("gpa", [0x8000, 1 << 32], ids=["below", "above"])
def test_a_tracker_report_is_traced_at_its_gpa(gpa: int) -> None:
    """The IOVAs may be above or below the GPAs."""
    iova = 0x10_0000
    reports: list[tuple[Callable[[TracedBitmap], None], list[int]]] = [
        (lambda bitmap: bitmap.set(iova + PAGE, 1), [0, 1, 0, 0]),
        (lambda bitmap: bitmap.set_many([iova, iova + 2 * PAGE], PAGE), [1, 0, 1, 0]),
        (lambda bitmap: bitmap.set_many([iova + PAGE], [2 * PAGE]), [0, 1, 1, 0]),
    ]
    for report, pages in reports:
        with TracedBitmap(iova, 4 * PAGE, PAGE, bytearray(8)) as bitmap:
            bitmap.trace, bitmap.gpa = ChainTrace([IovaRange(gpa, 4 * PAGE)]), gpa
            bitmap.trace.epoch = 1
            report(bitmap)
        assert bitmap.trace.links[Link.TRACKER].array.tolist() == pages


class LosesFirst:
    """A tracker that loses the page at GPA 0."""

    name = "loses-first"

    def __init__(self) -> None:
        self._inner = emulated_trackers()["iommu"]()

    def start(self, ranges: list[IovaRange], page_size: int) -> int:
        return self._inner.start(ranges, page_size)

    def stop(self) -> None:
        self._inner.stop()

    def dma(self, iova: int, length: int) -> None:
        if iova >= PAGE:
            self._inner.dma(iova, length)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        self._inner.read_and_clear(bitmap, iova, length)


class LosesFirstLog:
    """A log that loses the first page."""

    def __init__(self, log: DirtyLog) -> None:
        self._log = log

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        words = words.copy()
        words[0] &= ~np.uint64(1 << first_bit)
        self._log.merge(gpa, words, first_bit, pages)

    def close(self) -> None:
        self._log.close()


@pytest.mark.parametrize("link", [Link.TRACKER, Link.LOG, Link.QEMU])
def test_the_first_link_that_lost_a_page_is_found(link: Link) -> None:
    tracker = LosesFirst() if link == Link.TRACKER else emulated_trackers()["iommu"]()
    with ram_fd(64 * PAGE) as fd:
        memory = guest_memory(fd, (0, 64 * PAGE, 0))
        wrap = LosesFirstLog if link == Link.LOG else lambda log: log
        collector = Collector(tracker, wrap_log=wrap)  # type: ignore[arg-type]
        collector.start(BufferDirtyLog(bytearray(8)), memory, IovaMap.identity(memory))
        due = collector.due_epoch()
        tracker.dma(0, 1)
        tracker.dma(PAGE, 1)
        collector.harvest()
        links = collector.trace.links
        missed = [name for name in TRACED_LINKS if links[name].last(0) < due]
        assert (missed[0] if missed else Link.QEMU) == link
        assert all(links[name].last(PAGE) == due for name in TRACED_LINKS)
        # One report is not enough: a later write must be reported again.
        tracker.dma(PAGE, 1)
        assert links[Link.LOG].last(PAGE) < collector.due_epoch()


def test_a_page_may_have_two_iovas_that_differ_from_its_gpa() -> None:
    tracker = emulated_trackers()["iommu"]()
    buffer = bytearray(8)
    with ram_fd(64 * PAGE) as fd:
        memory = guest_memory(fd, (0, 64 * PAGE, 0))
        mappings = [IovaMapping(0x10000, 8 * PAGE, PAGE), IovaMapping(0x20000, 8 * PAGE, 2 * PAGE)]
        collector = Collector(tracker)
        collector.start(BufferDirtyLog(buffer), memory, IovaMap(mappings))
        tracker.dma(0x21000, 4)
        assert collector.harvest() == 1
        assert int.from_bytes(buffer, "little") == 1 << 9
        tracker.dma(0x10000, 1)
        tracker.dma(0x20000, 1)
        assert collector.harvest() == 2
        assert int.from_bytes(buffer, "little") == 0b11 << 8
        collector.stop()
        assert not collector.active
