"""Faults of trackers: the hardware or its driver forgets pages that the device wrote."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Final

import numpy as np

from ..dirty_log import LOG_PAGE_BYTES
from ..dirty_tracker import EmulatedTracker
from ..dirty_tracker.address_queue import AddressQueue
from ..iova_bitmap import IovaBitmap, IovaRange
from ..trace import Link
from ..units import div_ceil
from .fault import Fault

_HUGE_PAGE_BYTES: Final = 2 << 20


class _Wrapped(EmulatedTracker):
    """A tracker that passes all calls on to another."""

    def __init__(self, tracker: EmulatedTracker) -> None:
        self._tracker = tracker

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        return self._tracker.start(ranges, page_size)

    def stop(self) -> None:
        self._tracker.stop()

    def dma(self, iova: int, length: int) -> None:
        self._tracker.dma(iova, length)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        self._tracker.read_and_clear(bitmap, iova, length)


def _bitmap(iova: int, length: int, page_size: int) -> IovaBitmap:
    pages = div_ceil(length, page_size) + 1
    return IovaBitmap(iova, length, page_size, np.zeros(div_ceil(pages, 64), dtype=np.uint64))


class IgnoreOverflow(Fault):
    """The driver ignores that the address queue has overflowed, and misses the dropped entries."""

    name: ClassVar[str] = "ignore-overflow"
    link = Link.TRACKER
    tracker = AddressQueue.name
    value_means = "the number of queue entries"
    default = 16
    most = 1 << 18

    def wrap_tracker(self, tracker: EmulatedTracker) -> EmulatedTracker:
        """Return a short queue instead of `tracker`."""
        return _ForgetfulQueue(queue_entries=max(1, int(self.value)))


class _ForgetfulQueue(AddressQueue):
    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        self._overflowed = False
        super().read_and_clear(bitmap, iova, length)


class ClearBeforeRead(Fault):
    """Some harvests clear the tracker before they read it, and so report nothing."""

    name: ClassVar[str] = "clear-before-read"
    link = Link.TRACKER
    value_means = "the share of harvested ranges"
    default = 0.75

    def wrap_tracker(self, tracker: EmulatedTracker) -> EmulatedTracker:
        """Return a tracker that is sometimes cleared before it is read."""
        return _ClearedFirst(tracker, random.Random(self.seed), self.value)


class _ClearedFirst(_Wrapped):
    def __init__(self, tracker: EmulatedTracker, chance: random.Random, share: float) -> None:
        super().__init__(tracker)
        self._chance = chance
        self._share = share

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        if self._chance.random() < self._share:
            with _bitmap(iova, length, LOG_PAGE_BYTES) as forgotten:
                self._tracker.read_and_clear(forgotten, iova, length)
        self._tracker.read_and_clear(bitmap, iova, length)


class HugePageAs4K(Fault):
    """The tracker reports only the first 4 KiB of a dirty 2 MiB page."""

    name: ClassVar[str] = "huge-page-as-4k"
    link = Link.TRACKER

    def wrap_tracker(self, tracker: EmulatedTracker) -> EmulatedTracker:
        """Return a tracker with entries of 2 MiB."""
        return _FirstPieces(tracker)


class _FirstPieces(_Wrapped):
    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        with _bitmap(iova, length, _HUGE_PAGE_BYTES) as huge:
            self._tracker.read_and_clear(huge, iova, length)
            for start, size in huge.ranges():
                first = start // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
                for page in range(first, start + size, _HUGE_PAGE_BYTES):
                    bitmap.set(max(page, iova), LOG_PAGE_BYTES)
