"""The collector: it carries dirty pages from a tracker to a log, and alone knows both.

A *harvest* queries the tracker, range by range and through an `IovaBitmap`, for the pages written
since the last harvest. It translates their IOVAs to GPAs and merges the pages into the log.
Harvests happen

- at an interval, so that precopy sees the pages early and the last pass stays short;
- immediately after each write, if that was requested;
- once more before the device reports that it has stopped: QEMU syncs its log after GET_VRING_BASE
  is answered, so pages merged before the answer are in time, and pages merged later are not;
- for part of the IOVAs, before a mapping of an IOMMU is removed: afterwards nothing says which page
  an IOVA led to (iommufd and VFIO's type1 also read the dirty bits of the range that they unmap).

Harvests are numbered from 1. The number is the harvest's *epoch*. A write made now has to be
reported by the next harvest, whose number is `due_epoch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from .dirty_log import LOG_PAGE_BYTES, DirtyLog
from .dirty_tracker import DirtyTracker
from .guest_memory import WRITE, Bus, GuestMemory, IovaMap, IovaMapping
from .iova_bitmap import IovaBitmap, IovaRange
from .trace import ChainTrace, Link, TracedBitmap, TracedLog
from .units import div_ceil


@dataclass(frozen=True)
class Harvest:
    """The result of one harvest of all tracked ranges."""

    epoch: int
    """The number of the harvest, from 1."""
    time_ns: int
    """The time at which the harvest began, in nanoseconds of CLOCK_MONOTONIC."""
    duration_ns: int
    """The duration of the harvest in nanoseconds."""
    pages: int
    """The number of dirty pages found."""
    merged: int
    """The number of these pages that reached the log before the device reported that it stopped."""


class Collector:
    """The link from a tracker to a dirty log: it harvests the tracker while logging is on.

    Args:
        tracker: the tracker to harvest.
        wrap_log: called with each log that QEMU sends; returns the log to use.
        make_bitmap: called with the arguments of `IovaBitmap`; returns the iterator for one range.
        translate: called with a mapping; returns the guest-physical address at which it begins.
    """

    def __init__(
        self,
        tracker: DirtyTracker,
        *,
        wrap_log: Callable[[DirtyLog], DirtyLog] = lambda log: log,
        make_bitmap: Callable[..., TracedBitmap] = TracedBitmap,
        translate: Callable[[IovaMapping], int] = attrgetter("gpa"),
    ) -> None:
        self._tracker = tracker
        self._wrap_log = wrap_log
        self._make_bitmap = make_bitmap
        self._translate = translate
        self._log: DirtyLog | None = None
        self._memory = GuestMemory(())
        self._bus: Bus = IovaMap(())
        self.trace = ChainTrace(())
        """The trace of the pages that each link has passed on."""
        self.harvests: list[Harvest] = []
        """The harvests of all tracked ranges since `start`."""
        self.started_ns: int | None = None
        """The time of the last `start` in nanoseconds of CLOCK_MONOTONIC; None before it."""

    @property
    def active(self) -> bool:
        """Whether logging is on."""
        return self._log is not None

    def due_epoch(self) -> int:
        """Return the number of the harvest that has to report a write made now."""
        return self.trace.epoch + 1

    def start(self, log: DirtyLog, memory: GuestMemory, bus: Bus) -> None:
        """Start tracking, and collect into a log.

        Args:
            log: the log that receives the dirty pages.
            memory: the guest's RAM.
            bus: the IOVA ranges to track, and the mappings that lead to guest RAM.

        Raises:
            TrackerError: the tracker cannot watch these ranges.
        """
        self.stop()
        self.trace = ChainTrace(_gpa_ranges(memory))
        self.harvests = []
        self.started_ns = time.monotonic_ns()
        self._memory, self._bus = memory, bus
        self._tracker.start(bus.ranges, LOG_PAGE_BYTES)
        self._log = self._wrap_log(TracedLog(log, self.trace))

    def switch_log(self, log: DirtyLog) -> None:
        """Harvest into the old log, then use a new one.

        QEMU syncs the old log once more after the switch (vhost_dev_log_resize).

        Args:
            log: the new log.

        Raises:
            RuntimeError: logging is off.
        """
        if self._log is None:
            raise RuntimeError("switch_log: logging is off")
        self.harvest()
        self._log.close()
        self._log = self._wrap_log(TracedLog(log, self.trace))

    def remap(self, memory: GuestMemory, bus: Bus) -> None:
        """Harvest with the old memory map, then track with a new one.

        The call does nothing if logging is off.

        Args:
            memory: the guest's new RAM.
            bus: the new IOVA ranges, and the mappings that lead to the new RAM.
        """
        if self._log is None:
            return
        self.harvest()
        self._tracker.stop()
        self.trace.cover(_gpa_ranges(memory))
        self._memory, self._bus = memory, bus
        self._tracker.start(bus.ranges, LOG_PAGE_BYTES)

    def stop(self) -> None:
        """Harvest a last time, then stop tracking. Do nothing if logging is off."""
        if self._log is None:
            return
        try:
            self.harvest()
        finally:
            self._tracker.stop()
            self._log.close()
            self._log = None

    def flush(self) -> None:
        """Harvest before the device answers a ring's stop; for the last ring, the final flush."""
        self.harvest()

    def harvest(self) -> int:
        """Harvest every tracked range.

        Returns:
            The number of dirty pages found; 0 if logging is off.

        Raises:
            BitmapError: a page lies outside the log.
        """
        if self._log is None:
            return 0
        began_ns = time.monotonic_ns()
        merged_before = self.trace.merged_pages
        pages = self._collect(self._bus.mappings)
        duration_ns = time.monotonic_ns() - began_ns
        merged = self.trace.merged_pages - merged_before
        self.harvests.append(Harvest(self.trace.epoch, began_ns, duration_ns, pages, merged))
        return pages

    def harvest_write(self, iova: int, length: int) -> None:
        """Harvest immediately the pages that a write touched.

        Args:
            iova: the first IOVA of the write.
            length: the number of bytes written.
        """
        if self._log is None:
            return
        start = iova // LOG_PAGE_BYTES * LOG_PAGE_BYTES
        end = div_ceil(iova + length, LOG_PAGE_BYTES) * LOG_PAGE_BYTES
        pieces = []
        for gpa, size in self._bus.translate(start, end - start, WRITE):
            pieces.append(IovaMapping(start, gpa, size))
            start += size
        self._collect(pieces)

    def unmap(self, mappings: Iterable[IovaMapping]) -> None:
        """Harvest the pages written through mappings that are about to be removed.

        Args:
            mappings: the mappings, which still lead to the pages that were written.
        """
        if self._log is not None:
            self._collect(mappings)

    def harvest_everything(self) -> None:
        """Report every page as dirty, as a device must that cannot know what it dirtied."""
        every_page = IovaMap.identity(self._memory).mappings
        self._collect_from(lambda bitmap, *whole: bitmap.set(*whole), every_page)

    def _collect(self, mappings: Iterable[IovaMapping]) -> int:
        return self._collect_from(self._tracker.read_and_clear, mappings)

    def _collect_from(
        self, report: Callable[[IovaBitmap, int, int], None], mappings: Iterable[IovaMapping]
    ) -> int:
        assert self._log is not None
        self.trace.epoch += 1
        found = 0
        for mapping in mappings:
            pages = mapping.length // LOG_PAGE_BYTES
            words = np.zeros(div_ceil(pages, 64), dtype=np.uint64)
            with self._make_bitmap(mapping.iova, mapping.length, LOG_PAGE_BYTES, words) as bitmap:
                bitmap.trace, bitmap.gpa = self.trace, mapping.gpa
                bitmap.for_each(report)
            if not words.any():
                continue
            found += int(np.bitwise_count(words).sum())
            self.trace.see_bits(Link.ITERATOR, mapping.gpa, words, 0, pages)
            gpa = self._translate(mapping)
            self.trace.see_bits(Link.TRANSLATION, gpa, words, 0, pages)
            self._log.merge(gpa, words, 0, pages)
        return found


def _gpa_ranges(memory: GuestMemory) -> list[IovaRange]:
    return [IovaRange(slot.gpa, slot.length) for slot in memory.slots]
