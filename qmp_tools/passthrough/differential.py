"""The kernel's iterator compared with dmaproof's: the same ranges reported to both, bit for bit.

`iterator_cases` fills thousands of random bitmaps of every size, alignment and page size. Each one
has bits that were set before, and guard bytes on both sides. The kernel's iova_bitmap gets the
ranges through the device. `dma_cases` lets the device write, and compares the kernel's report with
an `IovaBitmap` that is filled from the journal, and with the changes in RAM, in both directions.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.dirty_tracker import DirtyTracker
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.units import PAGE_BYTES, div_ceil
from dmaproof.vfio.requests import bitmap_for
from dmaproof.vfio.trackers import DmaLogging, Type1Tracker

from .fake_device import Journal, content
from .fake_driver import FakeDriver, any_driver
from .outcome import require

_GUARD_BYTES: Final = 64
_UNIQUE_BYTES: Final = 16
_SPACE: Final = IovaRange(0, 1 << 52)
"""The IOVAs of the ranges for the iterator; the device writes nothing there."""
_MOST_PAGES: Final = 40 << 20
"""More than two windows of the kernel's iterator, each the bitmap of 2**24 pages."""
_RECORD_SHIFTS: Final = (12, 12, 12, 13, 16, 21, 30)


def _reports_by_window(driver: FakeDriver) -> bool:
    """Return whether the kernel asks the device once for each window, as Linux does up to 6.10.

    Then its iterator takes no range outside the current window.
    """
    before = driver.fake.stats()["reports"]
    driver.device.report(0, _MOST_PAGES * PAGE_BYTES, PAGE_BYTES)
    return driver.fake.stats()["reports"] > before + 1


def _case_pages(choose: random.Random, *, wide: bool) -> int:
    """Return a few pages, or about as many as a word or a page of the bitmap covers.

    If `wide`, return now and then more pages than a window covers.
    """
    kind = choose.random()
    if kind < 0.02 and wide:
        return choose.randrange((16 << 20) + 1, _MOST_PAGES)
    if kind < 0.3:
        return choose.randrange(1, 70)
    if kind < 0.6:
        return choose.choice((64, 128, 320, 4096, 32768)) + choose.randrange(-2, 3)
    return choose.randrange(1, 200_000)


def _ranges(choose: random.Random, base: int, pages: int, page_size: int) -> list[tuple[int, int]]:
    """Return ranges inside a bitmap: parts and runs of pages, some of them at edges of words."""
    length = pages * page_size
    found = []
    for _ in range(choose.choice((0, 1, 3, 20, 60))):
        longest = choose.choice((1, page_size, 3 * page_size, 70 * page_size, length))
        size = choose.randint(1, min(longest, length))
        start = choose.randrange(length - size + 1)
        if choose.random() < 0.3:  # at the edge of a word of the bitmap
            start = start // (64 * page_size) * (64 * page_size)
        found.append((base + start, size))
    return found


def iterator_cases(count: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Fill each of `count` random bitmaps by the kernel's iterator and by `IovaBitmap`."""
    choose = random.Random(seed)
    ranges = windows = 0
    with any_driver() as driver:
        driver.device.start_logging([_SPACE], PAGE_BYTES)
        wide = not _reports_by_window(driver)
        for case in range(count):
            page_size = 1 << choose.choice(_RECORD_SHIFTS)
            pages = _case_pages(choose, wide=wide)
            base = choose.randrange(1 << 20) * page_size
            chosen = _ranges(choose, base, pages, page_size)
            before = choose.choice((0, 0, 8, 2048, 0xFF1))
            kernels = _filled(choose, before + div_ceil(pages, 64) * 8)
            expected = kernels.copy()
            if chosen:
                driver.fake.mark(*_columns(chosen))
            bits = kernels[before + _GUARD_BYTES : -_GUARD_BYTES]
            driver.device.report(base, pages * page_size, page_size, bits)  # type: ignore[arg-type]
            with IovaBitmap(
                base, pages * page_size, page_size, expected[before + _GUARD_BYTES :]
            ) as bitmap:
                for iova, length in chosen:
                    bitmap.set(iova, length)
            require(
                bool(np.array_equal(kernels, expected)),
                f"seed {seed}, case {case}: {pages} pages of {page_size:#x} from {base:#x} on, "
                f"bitmap at +{before:#x}: the kernel's bitmap differs from IovaBitmap's, first at "
                f"byte "
                f"{int(np.flatnonzero(kernels != expected)[:1].sum())}",
            )
            ranges += len(chosen)
            windows += pages > 16 << 20
        driver.device.stop_logging()
    return (
        f"{count} bitmaps, {ranges} ranges: all bits equal, guard bytes unchanged",
        {"cases": count, "ranges": ranges, "wider_than_a_window": windows, "seed": seed},
    )


def _filled(choose: random.Random, size: int) -> NDArray[np.uint8]:
    """Return a bitmap of `size` bytes between guard bytes: clean, or with some bits set."""
    filled = np.zeros(size + 2 * _GUARD_BYTES, dtype=np.uint8)
    filled[:_GUARD_BYTES] = filled[-_GUARD_BYTES:] = 0xA5
    if choose.random() < 0.5:
        for _ in range(8):
            filled[_GUARD_BYTES + choose.randrange(size)] |= 1 << choose.randrange(8)
    return filled


def _columns(ranges: list[tuple[int, int]]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    table = np.array(ranges, dtype=np.uint64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def random_writes(choose: random.Random, window: IovaRange, count: int) -> list[tuple[int, int]]:
    """Return ranges in `window`: whole pages, runs of pages, and unaligned pieces."""
    found = []
    for _ in range(count):
        length = choose.choice(
            (1, 512, PAGE_BYTES, choose.randint(1, 3 * PAGE_BYTES), 16 * PAGE_BYTES)
        )
        start = choose.randrange(window.length - length + 1)
        if choose.random() < 0.5:
            start = min(start // PAGE_BYTES * PAGE_BYTES, window.length - length)
        found.append((window.iova + start, length))
    return found


def expected_bits(journal: Journal, query: IovaRange, page_size: int) -> NDArray[np.uint64]:
    """Return the bits that `IovaBitmap` sets for the journal's writes inside `query`."""
    bits = bitmap_for(query.length, page_size)
    with IovaBitmap(*query, page_size, bits) as bitmap:
        for entry in journal:
            first = max(int(entry["iova"]), query.iova)
            end = min(int(entry["iova"] + entry["length"]), query.iova + query.length)
            if first < end:
                bitmap.set(first, end - first)
    return bits


def changed_pages(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return for each page of memory whether it differs."""
    changed: NDArray[np.bool_] = np.logical_or.reduce(
        (before != after).reshape(-1, PAGE_BYTES), axis=1
    )
    return changed


def _pages_of(bits: NDArray[np.uint64], pages: int) -> NDArray[np.bool_]:
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:pages].astype(bool)


def dma_round(driver: FakeDriver, choose: random.Random, writes: int) -> tuple[int, int]:
    """Let the device write, have the kernel report, and compare report, journal and RAM.

    Returns:
        The number of dirty pages, and of reports.

    Raises:
        ProofFailedError: report, journal and RAM do not agree.
    """
    start = len(driver.fake.journal())
    before = driver.memory.copy()
    driver.fake.write(*_columns(random_writes(choose, driver.window, writes)))
    written = driver.fake.journal()[start:]
    require(len(written) == writes, f"{writes} writes, but {len(written)} in the journal")
    _check_content(driver, written)
    pages = len(driver.memory) // PAGE_BYTES
    bits = np.zeros(pages, dtype=bool)
    cuts = sorted({0, pages, *(choose.randrange(pages) for _ in range(choose.choice((0, 1, 5))))})
    for low, high in pairwise(cuts):
        query = IovaRange(driver.window.iova + low * PAGE_BYTES, (high - low) * PAGE_BYTES)
        found = driver.device.report(*query, PAGE_BYTES)
        expected = expected_bits(written, query, PAGE_BYTES)
        require(
            bool(np.array_equal(found, expected)),
            f"IOVA {query.iova:#x} + {query.length:#x}: the kernel's bitmap differs from "
            f"the journal's: "
            f"{int(np.bitwise_count(expected & ~found).sum())} pages missing, "
            f"{int(np.bitwise_count(found & ~expected).sum())} extra",
        )
        bits[low:high] = _pages_of(found, high - low)
        again = driver.device.report(*query, PAGE_BYTES)
        require(not again.any(), "a second report is not empty")
    changed = changed_pages(before, driver.memory)
    require(bool((changed <= bits).all()), "RAM changed in pages that were not reported")
    sure = surely_changed(written, driver.window)
    require(bool((sure <= changed).all()), "RAM does not have all writes of the journal")
    require(bool((sure <= bits).all()), "the device wrote pages that were not reported")
    return int(bits.sum()), len(cuts) - 1


def surely_changed(written: Journal, window: IovaRange) -> NDArray[np.bool_]:
    """Return for each page whether a write must have changed it.

    A write of few bytes may leave the bytes that the page had before, by chance.
    """
    sure = np.zeros(window.length // PAGE_BYTES, dtype=bool)
    for entry in written:
        start = int(entry["iova"]) - window.iova
        end = start + int(entry["length"])
        first, last = start // PAGE_BYTES, (end - 1) // PAGE_BYTES
        sure[first + 1 : last] = True
        for page in (first, last):
            overlap = min(end, (page + 1) * PAGE_BYTES) - max(start, page * PAGE_BYTES)
            sure[page] |= overlap >= _UNIQUE_BYTES
    return sure


def _check_content(driver: FakeDriver, written: Journal) -> None:
    """Check the journal: RAM must have every byte of the round's last write."""
    last = written[-1]
    at = int(last["iova"]) - driver.window.iova
    length = int(last["length"])
    require(
        bool(
            np.array_equal(
                driver.memory[at : at + length],
                content(int(last["sequence"]), int(last["iova"]), length),
            )
        ),
        f"RAM does not have the bytes of write {int(last['sequence'])}",
    )


def dma_cases(driver: FakeDriver, rounds: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Carry out `rounds` rounds of random DMA with the device's own log."""
    choose = random.Random(seed)
    driver.device.start_logging([driver.window], PAGE_BYTES)
    pages = reports = 0
    for _ in range(rounds):
        dirty, asked = dma_round(driver, choose, choose.choice((1, 10, 100)))
        pages += dirty
        reports += asked
    driver.device.stop_logging()
    return (
        f"{rounds} rounds, {pages} dirty pages, {reports} reports: kernel, journal and RAM agree",
        {"rounds": rounds, "pages": pages, "reports": reports, "seed": seed},
    )


def tracker_cases(driver: FakeDriver, rounds: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Read the kernel's trackers as `DirtyTracker`s, in ranges of any alignment."""
    choose = random.Random(seed)
    trackers: dict[str, DirtyTracker] = {"dma-logging": DmaLogging(driver.device)}
    if driver.container is not None:
        trackers["type1"] = Type1Tracker(driver.container)
    figures: dict[str, Any] = {"rounds": rounds, "seed": seed}
    for name, tracker in trackers.items():
        page_size = tracker.start([driver.window], PAGE_BYTES)
        pages = 0
        for _ in range(rounds):
            start = len(driver.fake.journal())
            driver.fake.write(*_columns(random_writes(choose, driver.window, 20)))
            expected = expected_bits(driver.fake.journal()[start:], driver.window, page_size)
            found = bitmap_for(driver.window.length, page_size)
            cut = choose.randrange(1, driver.window.length)  # of any alignment
            with IovaBitmap(*driver.window, page_size, found) as bitmap:
                tracker.read_and_clear(bitmap, driver.window.iova, cut)
                tracker.read_and_clear(bitmap, driver.window.iova + cut, driver.window.length - cut)
            require(
                bool(np.array_equal(found, expected)),
                f"{name}: {int(np.bitwise_count(expected & ~found).sum())} pages missing, "
                f"{int(np.bitwise_count(found & ~expected).sum())} extra",
            )
            # A page that was cut stays dirty, and is reported once more.
            with IovaBitmap(*driver.window, page_size, found) as bitmap:
                tracker.read_and_clear(bitmap, *driver.window)
            pages += int(np.bitwise_count(expected).sum())
        tracker.stop()
        figures[name] = pages
    return f"{', '.join(trackers)}: {rounds} rounds each, no page missing or extra", figures
