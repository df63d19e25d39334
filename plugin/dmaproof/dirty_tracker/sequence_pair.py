"""A pair of bitmaps, sequence and acknowledge, in the style of pds.

A page is dirty if its bits in the two bitmaps differ. The device makes them differ when it writes.
The driver reads both bitmaps, reports their XOR, and copies the sequence bits that it has read into
the acknowledge bitmap (drivers/vfio/pci/pds/dirty.c: `pds_vfio_dirty_seq_ack`). Neither side writes
the bitmap of the other, so no bit can be lost between them.

The bitmaps are transferred in whole 64-bit words. A query that does not begin or end at a word also
transfers neighbouring pages; their acknowledge bits are written back unchanged, so they stay dirty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange
from ..units import div_ceil
from .page_set import combine_ranges, page_runs, page_shift, report_pages
from .tracker import EmulatedTracker

_WORD_BITS = 64


class _Region(NamedTuple):
    """The two bitmaps of the pages `first` to `end` - 1."""

    first: int
    end: int
    sequence: NDArray[np.uint64]
    acknowledge: NDArray[np.uint64]


class SequencePair(EmulatedTracker):
    """Sequence and acknowledge bitmaps for at most `most_ranges` regions."""

    name: ClassVar[str] = "sequence-pair"

    def __init__(self, *, most_ranges: int = 8) -> None:
        self._most_ranges = most_ranges
        self._regions: list[_Region] | None = None
        self._shift = 0

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        if self._regions is not None:
            raise TrackerError("the sequence bitmaps are already tracking: call stop first")
        shift = page_shift(page_size)
        regions = []
        for iova, length in combine_ranges(ranges, self._most_ranges):
            first, end = iova >> shift, (iova + length - 1 >> shift) + 1
            words = div_ceil(end - first, _WORD_BITS)
            sequence, acknowledge = np.zeros((2, words), dtype=np.uint64)
            regions.append(_Region(first, end, sequence, acknowledge))
        self._shift, self._regions = shift, regions
        return page_size

    def stop(self) -> None:
        self._regions = None

    def dma(self, iova: int, length: int) -> None:
        """Make the two bitmaps differ."""
        for region, words, mask in self._touched(iova, length, outward=True):
            sequence = region.sequence[words]
            sequence ^= ~(sequence ^ region.acknowledge[words]) & mask

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report the XOR of the bitmaps, then acknowledge it.

        A page of which only a part was queried is reported but not acknowledged.
        """
        if self._regions is None:
            raise TrackerError("the sequence bitmaps are not tracking: call start first")
        for region, words, mask in self._touched(iova, length, outward=True):
            dirty = (region.sequence[words] ^ region.acknowledge[words]) & mask
            pairs = _core.find_set(dirty, 0, len(dirty) * _WORD_BITS)
            runs = page_runs(pairs, region.first + words.start * _WORD_BITS)
            report_pages(bitmap, runs, self._shift, iova, length)
        for region, words, mask in self._touched(iova, length, outward=False):
            acknowledge = region.acknowledge[words]
            acknowledge ^= (acknowledge ^ region.sequence[words]) & mask

    def _touched(
        self, iova: int, length: int, *, outward: bool
    ) -> Iterator[tuple[_Region, slice, NDArray[np.uint64]]]:
        """Yield each region with the words, and a mask of their bits, of the pages in the range.

        With `outward` these are the pages that the range touches, otherwise those that it contains.
        """
        first, end = iova >> self._shift, (iova + length - 1 >> self._shift) + 1
        if not outward:
            first, end = div_ceil(iova, 1 << self._shift), iova + length >> self._shift
        for region in self._regions or ():
            low, high = max(first, region.first) - region.first, min(end, region.end) - region.first
            if low < high:
                words = slice(low // _WORD_BITS, div_ceil(high, _WORD_BITS))
                mask = np.zeros(words.stop - words.start, dtype=np.uint64)
                _core.set_bits(mask, low % _WORD_BITS, high - low)
                yield region, words, mask
