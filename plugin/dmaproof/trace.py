"""The trace of the chain: which pages each link passed on, to find the link that lost a bit.

For every page a link keeps only the number of the last harvest (the *epoch*) in which the page
passed through the link. A write that had to be reported in epoch *e*, and that a link has not seen
in *e* or later, was lost at that link; the first such link, in the order of `Link`, is to blame.
The trace counts epochs rather than bits, because a page that is written again must be reported
again.

When the device has reported that it stopped, the trace is *frozen*: QEMU then syncs its log a last
time, and pages that a link passes on later do not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .dirty_log import LOG_PAGE_BYTES, DirtyLog, Words
from .iova_bitmap import ADDRESS_SPACE, Addresses, IovaBitmap, IovaRange
from .units import div_ceil


class Link(StrEnum):
    """The links at which a dirty page can be lost, in the order in which it travels."""

    TRACKER = "tracker"
    """The hardware, or its driver, does not report the page."""
    ITERATOR = "iterator"
    """The bitmap does not set the page's bit."""
    TRANSLATION = "translation"
    """The page's IOVA is translated to a wrong guest-physical address."""
    LOG = "log"
    """QEMU's dirty log does not receive the page's bit."""
    QEMU = "qemu"
    """QEMU does not send the page, although its bit is in the log."""


TRACED_LINKS: Final = (Link.TRACKER, Link.ITERATOR, Link.TRANSLATION, Link.LOG)
"""The links on the device's side of the shared log. A page that passed all of them reached QEMU."""


class PageEpochs:
    """The last epoch in which each 4 KiB page of some address ranges was seen; 0 for never.

    Addresses outside the ranges are ignored. `array` has one uint32 for each page, range after
    range.
    """

    def __init__(self, ranges: Iterable[IovaRange]) -> None:
        self.ranges: tuple[IovaRange, ...] = tuple(
            IovaRange(first * LOG_PAGE_BYTES, (last - first) * LOG_PAGE_BYTES)
            for first, last in (
                (start // LOG_PAGE_BYTES, div_ceil(start + length, LOG_PAGE_BYTES))
                for start, length in ranges
            )
        )
        pages = [length // LOG_PAGE_BYTES for _, length in self.ranges]
        self.array: NDArray[np.uint32] = np.zeros(sum(pages), dtype=np.uint32)
        edges = np.concatenate(([0], np.cumsum(pages, dtype=np.int64)))
        self._parts = [self.array[low:high] for low, high in itertools.pairwise(edges)]

    def see(self, address: int, length: int, epoch: int) -> None:
        """Note that the pages touched by `length` bytes at `address` were seen in `epoch`."""
        if length == 0:
            return
        first, last = address // LOG_PAGE_BYTES, (address + length - 1) // LOG_PAGE_BYTES
        for (start, size), part in zip(self.ranges, self._parts, strict=True):
            offset = start // LOG_PAGE_BYTES
            low, high = max(first - offset, 0), min(last + 1 - offset, size // LOG_PAGE_BYTES)
            if low < high:
                part[low:high] = epoch

    def see_many(
        self, addresses: NDArray[np.uint64], lengths: NDArray[np.uint64], epoch: int
    ) -> None:
        """Do `see` for each element of two arrays of the same shape."""
        first = addresses // np.uint64(LOG_PAGE_BYTES)
        last = (addresses + (lengths - np.uint64(1))) // np.uint64(LOG_PAGE_BYTES)
        single = first == last
        for (start, size), part in zip(self.ranges, self._parts, strict=True):
            pages = first[single] - np.uint64(start // LOG_PAGE_BYTES)  # pages below the range wrap
            part[pages[pages < np.uint64(size // LOG_PAGE_BYTES)]] = epoch
        for address, length in zip(addresses[~single], lengths[~single], strict=True):
            self.see(int(address), int(length), epoch)

    def see_bits(self, address: int, words: Words, first_bit: int, pages: int, epoch: int) -> None:
        """Note that the pages from `address` on whose bits are set in `words` were seen."""
        for (start, size), part in zip(self.ranges, self._parts, strict=True):
            low = max(address, start)
            high = min(address + pages * LOG_PAGE_BYTES, start + size)
            if low >= high:
                continue
            bit = first_bit + (low - address) // LOG_PAGE_BYTES
            count = (high - low) // LOG_PAGE_BYTES
            dirty = set_bits(words, bit, count)
            part[dirty + (low - start) // LOG_PAGE_BYTES] = epoch

    def covering(self, ranges: Iterable[IovaRange]) -> PageEpochs:
        """Return the epochs of these pages for other ranges; new pages have epoch 0."""
        other = PageEpochs(ranges)
        for (start, size), part in zip(self.ranges, self._parts, strict=True):
            for (new_start, new_size), new_part in zip(other.ranges, other._parts, strict=True):
                low, high = max(start, new_start), min(start + size, new_start + new_size)
                if low < high:
                    count = (high - low) // LOG_PAGE_BYTES
                    source = (low - start) // LOG_PAGE_BYTES
                    target = (low - new_start) // LOG_PAGE_BYTES
                    new_part[target : target + count] = part[source : source + count]
        return other

    def last(self, address: int) -> int:
        """Return the last epoch in which the page of `address` was seen; 0 for never."""
        for (start, size), part in zip(self.ranges, self._parts, strict=True):
            if start <= address < start + size:
                return int(part[(address - start) // LOG_PAGE_BYTES])
        return 0

    def last_many(self, pages: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """Return `last` of each page in an array of page numbers (address / 4096)."""
        found = np.zeros(len(pages), dtype=np.uint32)
        for (start, size), part in zip(self.ranges, self._parts, strict=True):
            offset = pages - np.uint64(start // LOG_PAGE_BYTES)  # pages below the range wrap
            inside = offset < np.uint64(size // LOG_PAGE_BYTES)
            found[inside] = part[offset[inside]]
        return found


def set_bits(words: Words, first_bit: int, bits: int) -> NDArray[np.int64]:
    """Return the positions of the set bits among `bits` bits of `words`, from `first_bit` on."""
    first_word, last_word = first_bit // 64, div_ceil(first_bit + bits, 64)
    piece = words[first_word:last_word]
    occupied = np.flatnonzero(piece)
    unpacked = np.unpackbits(
        piece[occupied].astype("<u8", copy=False).view(np.uint8), bitorder="little"
    ).reshape(-1, 64)
    row, column = np.nonzero(unpacked)
    positions = (occupied[row] + first_word) * 64 + column - first_bit
    return positions[(positions >= 0) & (positions < bits)]


class ChainTrace:
    """One `PageEpochs` over the GPAs of `ranges` for each traced link.

    The first two links know a page by its IOVA. The trace counts the page by the GPA to which the
    IOVA leads in that harvest, because behind an IOMMU the IOVA may lead elsewhere in the next one.

    `merged_pages` counts the pages that have reached the log in time; a page counts each time.
    """

    def __init__(self, ranges: Iterable[IovaRange]) -> None:
        self.epoch = 0
        self._frozen = False
        self.merged_pages = 0
        self.links = {link: PageEpochs(()) for link in TRACED_LINKS}
        self.cover(ranges)

    def resume(self, links: Mapping[Link, PageEpochs], epoch: int) -> None:
        """Continue from the pages that another process had seen by `epoch`."""
        self.epoch = epoch
        for link, pages in self.links.items():
            self.links[link] = links[link].covering(pages.ranges)

    def freeze(self) -> None:
        """Ignore later pages: the device has reported that it stopped, so they come too late."""
        self._frozen = True

    @property
    def is_frozen(self) -> bool:
        """Whether pages are ignored because they come too late."""
        return self._frozen

    def thaw(self) -> None:
        """Count pages again, because the device runs again."""
        self._frozen = False

    def see(self, link: Link, gpa: int, length: int) -> None:
        """Note that `link` has passed on the pages touched by `length` bytes at `gpa`."""
        if not self._frozen:
            self.links[link].see(gpa, length, self.epoch)

    def see_many(self, link: Link, gpas: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> None:
        """Do `see` for each element of two arrays of the same shape."""
        if not self._frozen:
            self.links[link].see_many(gpas, lengths, self.epoch)

    def see_bits(self, link: Link, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        """Note that `link` has passed on the pages from `gpa` on whose bits are set in `words`."""
        if not self._frozen:
            self.links[link].see_bits(gpa, words, first_bit, pages, self.epoch)

    def cover(self, ranges: Iterable[IovaRange]) -> None:
        """Trace these GPA ranges from now on; keep the epochs of pages that are still covered."""
        ranges = list(ranges)
        for link, pages in self.links.items():
            self.links[link] = pages.covering(ranges)


class TracedBitmap(IovaBitmap):
    """An `IovaBitmap` that traces what the tracker reports through it.

    It takes the arguments of `IovaBitmap`.
    """

    trace: ChainTrace
    """The trace that receives the reports; set by the collector."""
    gpa: int
    """The guest-physical address to which the first IOVA leads; set by the collector."""

    def set(self, iova: int, length: int) -> None:
        self.trace.see(Link.TRACKER, iova - self.iova + self.gpa, length)
        super().set(iova, length)

    def set_many(self, iovas: Addresses, lengths: Addresses | int) -> None:
        addresses = np.asarray(iovas, dtype=np.uint64)
        sizes = np.broadcast_to(np.asarray(lengths, dtype=np.uint64), addresses.shape)
        self.see_many(addresses, sizes)
        super().set_many(iovas, lengths)

    def see_many(self, iovas: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> None:
        """Trace ranges as reported by the tracker.

        Args:
            iovas: the first IOVA of each range.
            lengths: the length in bytes of each range, of the same shape.
        """
        moved = np.uint64((self.gpa - self.iova) % ADDRESS_SPACE)  # a sum may wrap
        self.trace.see_many(Link.TRACKER, iovas + moved, lengths)


class TracedLog:
    """A dirty log that traces the pages that reach the log which it wraps."""

    def __init__(self, log: DirtyLog, trace: ChainTrace) -> None:
        self._log = log
        self._trace = trace

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        self._log.merge(gpa, words, first_bit, pages)
        self._trace.see_bits(Link.LOG, gpa, words, first_bit, pages)
        if not self._trace.is_frozen:
            self._trace.merged_pages += len(set_bits(words, first_bit, pages))

    def close(self) -> None:
        self._log.close()
