"""Faults of the translation from IOVA to GPA: wrong addresses, or an outdated memory table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from ..collector import Collector
from ..dirty_log import DirtyLog
from ..guest_memory import Bus, GuestMemory, IovaMapping
from ..trace import Link
from .fault import Fault
from .log import ShortLog


class IovaAsGpa(Fault):
    """The log receives IOVAs instead of GPAs."""

    name: ClassVar[str] = "iova-as-gpa"
    link = Link.TRANSLATION
    needs_iommu: ClassVar[bool] = True

    def translate(self, mapping: IovaMapping) -> int:
        """Return the IOVA."""
        return mapping.iova

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Return a log that ignores IOVAs beyond its end."""
        return ShortLog(log)


class _UnmapsWithoutHarvest(Collector):
    def unmap(self, mappings: Iterable[IovaMapping]) -> None:
        pass


class UnmapUnharvested(Fault):
    """The back end removes a mapping without harvesting the pages written through it."""

    name: ClassVar[str] = "unmap-unharvested"
    link = Link.TRACKER
    needs_iommu: ClassVar[bool] = True
    collector_type = _UnmapsWithoutHarvest


class _KeepsOldTable(Collector):
    def remap(self, memory: GuestMemory, bus: Bus) -> None:
        self.harvest()


class OldMemoryTable(Fault):
    """After a memory hotplug the back end tracks the old memory table, without the new slot."""

    name: ClassVar[str] = "old-memory-table"
    link = Link.TRACKER
    needs = "memory hotplug"
    collector_type = _KeepsOldTable
