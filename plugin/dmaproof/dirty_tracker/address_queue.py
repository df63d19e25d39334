"""A page tracker that reports addresses through a queue, in the style of mlx5.

The device holds page-tracker objects, one for each range that it watches. It has few of them, so
ranges are combined. The device writes the address of each page that it dirtied into a receive queue
of bounded length (drivers/vfio/pci/mlx5/cmd.c: `mlx5vf_tracker_read_and_clear`). When the queue is
full, reports are lost. From then on every page may be dirty, and the driver has to report that (the
mlx5 driver fails the query, and QEMU then treats all pages as dirty).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange
from ..units import PAGE_BYTES
from .page_set import PageSet, combine_ranges, page_shift
from .tracker import EmulatedTracker

_logger = logging.getLogger(__name__)


class AddressQueue(EmulatedTracker):
    """Page-tracker objects that share a queue of `queue_entries` addresses.

    The device watches at most `most_ranges` ranges, with pages of `least_page_size` to
    `greatest_page_size` bytes. `overflows` counts the harvests before which reports were lost.
    """

    name: ClassVar[str] = "address-queue"

    def __init__(
        self,
        *,
        queue_entries: int = 1 << 18,
        most_ranges: int = 8,
        least_page_size: int = PAGE_BYTES,
        greatest_page_size: int = 1 << 30,
    ) -> None:
        self._queue = np.zeros(queue_entries, dtype=np.uint64)
        self._most_ranges = most_ranges
        self._page_sizes = (least_page_size, greatest_page_size)
        self._collected: PageSet | None = None
        self.overflows = 0

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Watch the ranges, with the nearest page size that the device supports."""
        if self._collected is not None:
            raise TrackerError("the page tracker is already tracking: call stop first")
        page_shift(page_size)  # refuses an invalid page size
        page_size = min(max(page_size, self._page_sizes[0]), self._page_sizes[1])
        self._collected = PageSet(combine_ranges(ranges, self._most_ranges), page_size)
        self._filled = 0
        self._overflowed = False
        return page_size

    def stop(self) -> None:
        self._collected = None

    def dma(self, iova: int, length: int) -> None:
        """Queue the addresses; lose them if the queue is full."""
        if self._collected is None:
            return
        for first, pages in self._collected.inside(iova, length):
            room = len(self._queue) - self._filled
            if pages > room:
                self._overflowed = True
                pages = room
            if pages == 1:
                self._queue[self._filled] = first
            else:
                self._queue[self._filled : self._filled + pages] = np.arange(
                    first, first + pages, dtype=np.uint64
                )
            self._filled += pages

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Empty the queue and report the pages; keep those outside the queried range."""
        if self._collected is None:
            raise TrackerError("the page tracker is not tracking: call start first")
        if self._overflowed:
            self.overflows += 1
            self._overflowed = False
            self._collected.add_all()
            _logger.warning(
                "the queue of %d addresses overflowed: every tracked page is reported as dirty",
                len(self._queue),
            )
        self._collected.add_pages(self._queue[: self._filled])
        self._filled = 0
        self._collected.report(bitmap, iova, length)
