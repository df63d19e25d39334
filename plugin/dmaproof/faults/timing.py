"""Faults of timing: each link does its work, but too early or too late."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, ClassVar, Final

import numpy as np

from ..collector import Collector
from ..dirty_log import LOG_PAGE_BYTES, DirtyLog
from ..dirty_tracker import DirtyTracker
from ..dma import Dma
from ..guest_memory import Bus, GuestMemory, IovaMapping
from ..journal import WriteKind
from ..trace import Link
from ..vhost_user.session import Session
from .fault import Fault, uniform

_LATE_S: Final = 0.05
_HELD_BACK_S_PER_PAGE: Final = 0.0005
"""The average delay per page in seconds, so that longer delays affect fewer pages."""


class _NoFlush(Collector):
    def flush(self) -> None:
        pass


class NoFinalFlush(Fault):
    """A device that stops does not log the pages written since the last harvest."""

    name: ClassVar[str] = "no-final-flush"
    link = Link.TRACKER
    harvest = "final"  # a periodic harvest may run between the last write and the stop
    collector_type = _NoFlush


class _LateSession(Session):
    def receive(self) -> None:
        super().receive()
        if self.collector.active and not self.running:
            time.sleep(_LATE_S)
            self.collector.harvest()


class LateFinalFlush(NoFinalFlush):
    """A device that stops logs the last pages 50 ms after it has answered GET_VRING_BASE."""

    name: ClassVar[str] = "late-final-flush"
    session_type = _LateSession


class BitBeforeData(Fault):
    """The log receives the dirty bits of some pages before their data is in guest RAM."""

    name: ClassVar[str] = "bit-before-data"
    link = Link.TRACKER
    harvest = "immediate"
    value_means = "the delay of the data in seconds"
    default = 0.6
    most = 10.0

    def __init__(self, value: str, seed: int) -> None:
        super().__init__(value, seed)
        self._seen: set[int] = set()

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        """Return a `Dma` that delays the data of some pages."""
        dma = _DelayedDataDma(*arguments, **options)
        dma.fault = self
        return dma

    def chooses(self, page: int) -> bool:
        """Return whether the data of this page is delayed: at its first write, by the seed."""
        if page in self._seen:
            return False
        self._seen.add(page)
        share = min(0.1, _HELD_BACK_S_PER_PAGE / self.value)
        return bool(uniform(np.array([page], dtype=np.uint64), self.seed)[0] < share)


class _DelayedDataDma(Dma):
    fault: BitBeforeData

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        if (
            kind == WriteKind.DATA
            and self.journal.recording
            and self.fault.chooses(iova // LOG_PAGE_BYTES)
        ):
            self._mark(iova, len(data))
            time.sleep(self.fault.value)
            self._put(iova, data, kind)
        else:
            super().write(iova, data, kind)


class TrackerAfterLog(Fault):
    """The tracker starts some harvests after logging is switched on."""

    name: ClassVar[str] = "tracker-after-log"
    link = Link.TRACKER
    value_means = "the number of harvests"
    default = 15
    most = 1 << 20

    def make_collector(self, tracker: DirtyTracker) -> Collector:
        """Return a collector that starts its tracker late."""
        collector = _LateTracker(tracker, wrap_log=self.wrap_log, make_bitmap=self.make_bitmap)
        collector.missed_harvests = max(1, int(self.value))
        return collector


class _LateTracker(Collector):
    missed_harvests: int
    _left = 0

    def start(self, log: DirtyLog, memory: GuestMemory, bus: Bus) -> None:
        super().start(log, memory, bus)
        self._tracker.stop()
        self._left = self.missed_harvests

    def remap(self, memory: GuestMemory, bus: Bus) -> None:
        super().remap(memory, bus)
        if self._left:
            self._tracker.stop()

    def _collect(self, mappings: Iterable[IovaMapping]) -> int:
        if not self._left:
            return super()._collect(mappings)
        self.trace.epoch += 1
        self._left -= 1
        if not self._left:
            self._tracker.start(self._bus.ranges, LOG_PAGE_BYTES)
        return 0
