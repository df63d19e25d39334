"""Faults of the way from IOVA to GPA: the wrong pages, or the wrong memory table, are followed."""

from __future__ import annotations

from typing import ClassVar

from ..collector import Collector
from ..dirty_log import DirtyLog
from ..guest_memory import GuestMemory, IovaMap, IovaMapping
from ..trace import Link
from .fault import Fault


class _Untranslated(Collector):
    def start(self, log: DirtyLog, memory: GuestMemory, iova_map: IovaMap) -> None:
        super().start(log, memory, _identity(iova_map))

    def remap(self, memory: GuestMemory, iova_map: IovaMap) -> None:
        super().remap(memory, _identity(iova_map))


def _identity(iova_map: IovaMap) -> IovaMap:
    return IovaMap(IovaMapping(iova, iova, length) for iova, _, length in iova_map.mappings)


class IovaAsGpa(Fault):
    """The log gets IOVAs where GPAs are due."""

    name: ClassVar[str] = "iova-as-gpa"
    link = Link.TRANSLATION
    needs = "an IOMMU"
    collector_type = _Untranslated


class _Conservative(Collector):
    def remap(self, memory: GuestMemory, iova_map: IovaMap) -> None:
        self.harvest()


class OldMemoryTable(Fault):
    """After a memory hotplug the old memory table is tracked, and the new slot is not."""

    name: ClassVar[str] = "old-memory-table"
    link = Link.TRACKER
    needs = "memory hotplug"
    collector_type = _Conservative
