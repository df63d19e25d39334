"""A device's only access to guest RAM.

A device writes only through `Dma.write`, so every write is journalled and tracked. The order is
that of hardware: the data is in RAM before the tracker records the write, and therefore before the
bit of the page can reach any log.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from .guest_memory import WRITE, Bus, GuestMemory
from .journal import Journal, WriteKind
from .units import PAGE_BYTES


class DmaMarker(Protocol):
    """The part of a dirty tracker that `Dma` uses."""

    def dma(self, iova: int, length: int) -> None:
        """Record that the device wrote `length` bytes at `iova`."""


class Window:
    """A read-only view of guest RAM at contiguous IOVAs, whose `pages` may lie anywhere in RAM.

    The window begins `start` bytes into the first page.
    """

    def __init__(self, pages: Sequence[memoryview], start: int) -> None:
        self._pages = pages
        self._start = start

    def unpack(self, layout: struct.Struct, offset: int) -> tuple[Any, ...]:
        """Read one field at `offset` bytes.

        The field must be aligned to its size, a power of two, so that it lies on a single page.
        """
        place = self._start + offset
        return layout.unpack_from(self._pages[place // PAGE_BYTES], place % PAGE_BYTES)


class Dma:
    """A device's only access to guest RAM: reads and writes by IOVA.

    Each write is journalled and tracked.

    Args:
        memory: the guest's RAM.
        bus: translates IOVAs to guest-physical addresses.
        tracker: records each write by its method ``dma``; any `EmulatedTracker` does.
        journal: records each write.
        due_epoch: returns the number of the harvest that has to report a write made now; see
            `Collector.due_epoch`.
        after_write: called as ``after_write(iova, length)`` once the tracker has recorded a write;
            see `Collector.harvest_write`.
    """

    def __init__(
        self,
        memory: GuestMemory,
        bus: Bus,
        tracker: DmaMarker,
        journal: Journal,
        *,
        due_epoch: Callable[[], int],
        after_write: Callable[[int, int], None] | None = None,
    ) -> None:
        self.memory = memory
        """The guest's RAM."""
        self.bus = bus
        """The translation from IOVAs to guest-physical addresses."""
        self.journal = journal
        """The journal that records each write."""
        self._tracker = tracker
        self._due_epoch = due_epoch
        self._after_write = after_write

    def require(
        self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]
    ) -> None:
        """Check that all ranges of a request are mapped before any part of it is carried out.

        Args:
            readable: the (IOVA, length in bytes) ranges that will be read.
            writable: the (IOVA, length in bytes) ranges that will be written.

        Raises:
            IotlbMissError: a mapping is missing and has to be requested from the IOMMU.
        """
        self.bus.require(readable, writable)

    def read(self, iova: int, length: int) -> bytes:
        """Read guest RAM.

        Args:
            iova: the first IOVA.
            length: the number of bytes.

        Returns:
            A copy of the bytes.

        Raises:
            MemoryAccessError: some byte is not mapped.
        """
        pieces = self.bus.translate(iova, length)
        return b"".join(bytes(self.memory.view(gpa, size)) for gpa, size in pieces)

    def view(self, iova: int, length: int) -> Window:
        """Open a window on guest RAM that is read repeatedly, such as a ring.

        Behind an IOMMU the window is valid until one of its mappings is removed.

        Args:
            iova: the first IOVA.
            length: the number of bytes.

        Returns:
            The window, which is read-only.

        Raises:
            MemoryAccessError: some byte is not mapped.
        """
        start = iova % PAGE_BYTES
        pages = [
            self.memory.view(gpa, size).toreadonly()
            for page in range(iova - start, iova + length, PAGE_BYTES)
            for gpa, size in self.bus.translate(page, PAGE_BYTES)
        ]
        return Window(pages, start)

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        """Write guest RAM, journal the write, and report it to the tracker.

        Args:
            iova: the first IOVA.
            data: the bytes to write.
            kind: what the device writes; request data by default.

        Raises:
            MemoryAccessError: some byte is not mapped; nothing was written.
        """
        self._put(iova, data, kind)
        self._mark(iova, len(data))

    def _put(self, iova: int, data: bytes | memoryview, kind: WriteKind) -> None:
        """Carry out the first half of a write: store the data, and journal it."""
        pieces = [
            (gpa, self.memory.view(gpa, size))
            for gpa, size in self.bus.translate(iova, len(data), WRITE)
        ]
        epoch = self._due_epoch()
        offset = 0
        source = memoryview(data)
        for gpa, target in pieces:
            piece = source[offset : offset + len(target)]
            self._store(iova + offset, target, piece)
            self.journal.write(kind, iova + offset, gpa, piece, epoch)
            offset += len(target)

    def _store(self, iova: int, target: memoryview, data: memoryview) -> None:
        """Copy `data` to `target`, the RAM at `iova`."""
        target[:] = data

    def _mark(self, iova: int, length: int) -> None:
        """Carry out the second half of a write: report it, and call `after_write`."""
        self._tracker.dma(iova, length)
        if self._after_write is not None:
            self._after_write(iova, length)
