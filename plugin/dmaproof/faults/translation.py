"""Faults of the way from IOVA to GPA: the wrong pages, or the wrong memory table, are followed."""

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
    """The log gets IOVAs where GPAs are due."""

    name: ClassVar[str] = "iova-as-gpa"
    link = Link.TRANSLATION
    needs_iommu: ClassVar[bool] = True

    def translate(self, mapping: IovaMapping) -> int:
        """The IOVA."""
        return mapping.iova

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """A log that takes no notice of IOVAs behind its end."""
        return ShortLog(log)


class _Hasty(Collector):
    def unmap(self, mappings: Iterable[IovaMapping]) -> None:
        pass


class UnmapUnharvested(Fault):
    """A mapping is taken away before the pages written through it have been collected."""

    name: ClassVar[str] = "unmap-unharvested"
    link = Link.TRACKER
    needs_iommu: ClassVar[bool] = True
    collector_type = _Hasty


class _Conservative(Collector):
    def remap(self, memory: GuestMemory, bus: Bus) -> None:
        self.harvest()


class OldMemoryTable(Fault):
    """After a memory hotplug the old memory table is tracked, and the new slot is not."""

    name: ClassVar[str] = "old-memory-table"
    link = Link.TRACKER
    needs = "memory hotplug"
    collector_type = _Conservative
