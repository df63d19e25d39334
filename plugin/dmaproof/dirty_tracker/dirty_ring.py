"""A ring of dirty pages that are reset once they are collected, in the style of KVM's dirty ring.

Pages are write-protected at first. The first write to one takes the protection away and puts the
page into the ring; further writes leave no trace. Collecting copies the ring's pages into a bitmap
(QEMU: `kvm_dirty_ring_reap`), and *reset* protects them again (KVM_RESET_DIRTY_RINGS). The order is
what matters: a page written between being collected and being reset is not put into the ring
again, so its data must be read after the reset only.

A ring that is full stops its writer until it is collected (KVM_EXIT_DIRTY_RING_FULL), so nothing is
ever lost, at the price of a stall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange
from .page_set import PageSet
from .tracker import EmulatedTracker


class DirtyRing(EmulatedTracker):
    """A ring of `ring_entries` page numbers; `full_exits` counts how often it stopped a writer."""

    name: ClassVar[str] = "dirty-ring"

    def __init__(self, *, ring_entries: int = 65536) -> None:
        self._ring = np.zeros(ring_entries, dtype=np.uint64)
        self._filled = 0
        self._writable: PageSet | None = None
        self._collected = PageSet((), 1)
        self.full_exits = 0

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Protect every page."""
        if self._writable is not None:
            raise TrackerError("the dirty ring tracks already")
        self._collected = PageSet(ranges, page_size)
        self._writable = PageSet(ranges, page_size)
        self._filled = 0
        return page_size

    def stop(self) -> None:
        self._writable = None

    def dma(self, iova: int, length: int) -> None:
        """Put the pages that are still protected into the ring."""
        if self._writable is None:
            return
        for first, pages in self._writable.missing(iova, length):
            self._push(first, pages)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        if self._writable is None:
            raise TrackerError("the dirty ring does not track: call start first")
        self._collect_and_reset(self._writable)
        self._collected.report(bitmap, iova, length)

    def _push(self, first: int, pages: int) -> None:
        assert self._writable is not None
        while pages:
            if self._filled == len(self._ring):
                self.full_exits += 1
                self._collect_and_reset(self._writable)
            here = min(pages, len(self._ring) - self._filled)
            self._writable.add_run(first, here)
            numbers = first if here == 1 else np.arange(first, first + here, dtype=np.uint64)
            self._ring[self._filled : self._filled + here] = numbers
            self._filled += here
            first, pages = first + here, pages - here

    def _collect_and_reset(self, writable: PageSet) -> None:
        pages = self._ring[: self._filled]
        self._collected.add_pages(pages)
        writable.remove_pages(pages)
        self._filled = 0
