"""A set of pages over many IOVA ranges: the state that several trackers share.

`PageSet` has one private bitmap for each range. A page that it reports leaves the set, unless only
part of the page was queried: such a page stays in the set and is reported again. Otherwise the
other parts of the page would be lost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import TrackerError
from ..iova_bitmap import ADDRESS_SPACE, IovaBitmap, IovaRange
from ..units import div_ceil


class _Span(NamedTuple):
    first: int
    """The number of the first page."""
    end: int
    bits: NDArray[np.uint64]


def page_shift(page_size: int) -> int:
    """Return log2 of `page_size` in bytes.

    Raises:
        TrackerError: the page size is not a power of two up to 2**63.
    """
    if not 0 < page_size <= 1 << 63 or page_size & (page_size - 1):
        raise TrackerError(f"page size {page_size:#x} is not a power of two up to 2**63")
    return page_size.bit_length() - 1


def combine_ranges(ranges: Sequence[IovaRange], most: int) -> list[IovaRange]:
    """Return at most `most` sorted ranges that cover `ranges`; close the smallest gaps.

    Drivers of hardware that tracks few ranges do the same (mlx5: `combine_ranges` of VFIO's core).

    Raises:
        TrackerError: a range is empty or leaves the 64-bit space, or two overlap.
    """
    ranges = sorted(ranges)
    for iova, length in ranges:
        if iova < 0 or length < 1 or iova + length > ADDRESS_SPACE:
            raise TrackerError(f"IOVA {iova:#x} + {length:#x} is empty or leaves the 64-bit space")
    gaps = [high.iova - low.iova - low.length for low, high in pairwise(ranges)]
    if any(gap < 0 for gap in gaps):
        raise TrackerError("the ranges to track overlap")
    kept = sorted(sorted(range(len(gaps)), key=gaps.__getitem__, reverse=True)[: most - 1])
    starts = [0, *(gap + 1 for gap in kept)]
    ends = [*kept, len(gaps)]
    return [
        IovaRange(ranges[first].iova, ranges[last].iova + ranges[last].length - ranges[first].iova)
        for first, last in zip(starts, ends, strict=True)
        if ranges
    ]


class PageSet:
    """A set of pages of `page_size` bytes (a power of two) within `ranges`, empty at first.

    Ranges are rounded to whole pages. Pages outside the ranges are ignored.

    Raises:
        TrackerError: `combine_ranges` or `page_shift` refuses the arguments.
    """

    def __init__(self, ranges: Sequence[IovaRange], page_size: int) -> None:
        self._shift = page_shift(page_size)
        self._spans: list[_Span] = []
        edges: list[list[int]] = []
        for iova, length in combine_ranges(ranges, len(ranges)):
            first, end = iova >> self._shift, (iova + length - 1 >> self._shift) + 1
            if edges and first <= edges[-1][1]:
                edges[-1][1] = max(end, edges[-1][1])
            else:
                edges.append([first, end])
        for first, end in edges:
            bits = np.zeros(div_ceil(end - first, 64), dtype=np.uint64)
            self._spans.append(_Span(first, end, bits))
        self._starts = [span.first for span in self._spans]

    def add_run(self, first: int, pages: int) -> None:
        """Add `pages` pages from number `first` on."""
        for span, low, high in self._touched(first << self._shift, pages << self._shift):
            _core.set_bits(span.bits, low - span.first, high - low, False)

    def add_pages(self, pages: NDArray[np.uint64]) -> None:
        """Add pages by their numbers."""
        for span in self._spans:
            inside = (pages >= span.first) & (pages < span.end)
            _core.set_ranges(span.bits, span.first, span.end - 1, 0, pages[inside], 1, False)

    def remove_pages(self, pages: NDArray[np.uint64]) -> None:
        """Remove pages by their numbers."""
        for span in self._spans:
            at = pages[(pages >= span.first) & (pages < span.end)] - np.uint64(span.first)
            masks = ~(np.uint64(1) << at % np.uint64(64))
            np.bitwise_and.at(span.bits, at // np.uint64(64), masks)

    def add_all(self) -> None:
        """Add every page."""
        for span in self._spans:
            _core.set_bits(span.bits, 0, span.end - span.first)

    def inside(self, iova: int, length: int) -> list[tuple[int, int]]:
        """Return the (first page, pages) runs of the ranges that `length` bytes at `iova` touch."""
        return [(low, high - low) for _, low, high in self._touched(iova, length)]

    def missing(self, iova: int, length: int) -> list[tuple[int, int]]:
        """Return the runs of `inside` that are not in the set."""
        found = []
        for span, low, high in self._touched(iova, length):
            present = page_runs(_core.find_set(span.bits, low - span.first, high - low), low)
            edges = [low, *present.cumsum(axis=1, dtype=np.uint64).ravel().tolist(), high]
            found += [
                (first, end - first)
                for first, end in zip(edges[::2], edges[1::2], strict=True)
                if first < end
            ]
        return found

    def report(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report the pages of the set in `length` bytes from `iova` on, clipped to these bytes."""
        whole_first = div_ceil(iova, 1 << self._shift)
        whole_end = iova + length >> self._shift
        for span, low, high in self._touched(iova, length):
            middle = min(max(low, whole_first), high)
            middle_end = max(middle, min(whole_end, high))
            for first, end in ((low, middle), (middle, middle_end), (middle_end, high)):
                collect = _core.take_set if (first, end) == (middle, middle_end) else _core.find_set
                runs = page_runs(collect(span.bits, first - span.first, end - first), first)
                report_pages(bitmap, runs, self._shift, iova, length)

    def _touched(self, iova: int, length: int) -> Iterator[tuple[_Span, int, int]]:
        """Yield the spans that the range touches, with the first and the end page in each."""
        first, end = iova >> self._shift, (iova + length - 1 >> self._shift) + 1
        index = max(bisect_right(self._starts, first) - 1, 0)
        while index < len(self._spans) and self._starts[index] < end:
            span = self._spans[index]
            low, high = max(first, span.first), min(end, span.end)
            if low < high:
                yield span, low, high
            index += 1


def page_runs(pairs: bytes, first_page: int) -> NDArray[np.uint64]:
    """Return the (first page, pages) runs that `_core` found, shape (runs, 2)."""
    runs = np.frombuffer(pairs, dtype=np.uint64).reshape(-1, 2).copy()
    runs[:, 0] += np.uint64(first_page)
    return runs


def report_pages(
    bitmap: IovaBitmap, runs: NDArray[np.uint64], shift: int, iova: int, length: int
) -> None:
    """Report runs of pages of ``1 << shift`` bytes, clipped to `length` bytes from `iova`."""
    bits, one = np.uint64(shift), np.uint64(1)
    starts = np.maximum(runs[:, 0] << bits, np.uint64(iova))
    lasts = np.minimum(((runs[:, 0] + runs[:, 1]) << bits) - one, np.uint64(iova + length - 1))
    bitmap.set_many(starts, lasts - starts + one)
