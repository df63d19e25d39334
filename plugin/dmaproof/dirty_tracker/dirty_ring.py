"""A ring of dirty pages that are reset after they are collected, in the style of KVM's dirty ring.

Pages are write-protected at first. The first write to a page removes the protection and puts the
page into the ring; further writes to it leave no trace. *Collecting* copies the ring's pages into a
bitmap (QEMU: `kvm_dirty_ring_reap`), and *reset* protects them again (KVM_RESET_DIRTY_RINGS). The
order matters: a page that is written after it was collected and before its reset does not enter the
ring again, so its data must be read only after the reset.

A full ring stops its writer until the ring is collected (KVM_EXIT_DIRTY_RING_FULL). So no page is
lost, at the cost of a stall.
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
    """A ring of `ring_entries` page numbers; `full_exits` counts the stops of its writer."""

    name: ClassVar[str] = "dirty-ring"

    def __init__(self, *, ring_entries: int = 65536) -> None:
        self._ring = np.zeros(ring_entries, dtype=np.uint64)
        self._filled = 0
        self._writable: PageSet | None = None
        self._collected = PageSet((), 1)
        self.full_exits = 0

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Write-protect every page of the ranges."""
        if self._writable is not None:
            raise TrackerError("the dirty ring is already tracking: call stop first")
        self._collected = PageSet(ranges, page_size)
        self._writable = PageSet(ranges, page_size)
        self._filled = 0
        return page_size

    def stop(self) -> None:
        self._writable = None

    def dma(self, iova: int, length: int) -> None:
        """Put those pages into the ring that are still protected."""
        if self._writable is None:
            return
        for first, pages in self._writable.missing(iova, length):
            self._push(first, pages)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        if self._writable is None:
            raise TrackerError("the dirty ring is not tracking: call start first")
        self._collect_and_reset(self._writable)
        self._collected.report(bitmap, iova, length)

    def _push(self, first: int, pages: int) -> None:
        assert self._writable is not None
        while pages:
            if self._filled == len(self._ring):
                self.full_exits += 1
                self._collect_and_reset(self._writable)
            fitting = min(pages, len(self._ring) - self._filled)
            self._writable.add_run(first, fitting)
            numbers = first if fitting == 1 else np.arange(first, first + fitting, dtype=np.uint64)
            self._ring[self._filled : self._filled + fitting] = numbers
            self._filled += fitting
            first, pages = first + fitting, pages - fitting

    def _collect_and_reset(self, writable: PageSet) -> None:
        pages = self._ring[: self._filled]
        self._collected.add_pages(pages)
        writable.remove_pages(pages)
        self._filled = 0
