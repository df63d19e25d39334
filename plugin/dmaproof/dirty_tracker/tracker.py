"""The interfaces of a dirty tracker: for the collector, and for a device in software."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from ..iova_bitmap import IovaBitmap, IovaRange


class DirtyTracker(Protocol):
    """The interface between the collector and a tracker, which the kernel or software implements.

    The order of calls is `start`, then any number of `read_and_clear`, then `stop`.
    """

    @abstractmethod
    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Start watching IOVA ranges. No page is dirty at first.

        Args:
            ranges: the ranges to watch, which do not overlap.
            page_size: the wanted page size in bytes, a power of two.

        Returns:
            The page size in bytes that the tracker uses; hardware may not support the wanted one.

        Raises:
            TrackerError: the tracker is already watching, or cannot watch these ranges.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop watching, and forget all dirty pages; do nothing if the tracker is not watching."""

    @abstractmethod
    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report the dirty ranges of a queried range into a bitmap, and forget them.

        The tracker may report more than was written, as hardware with coarse pages does, but never
        less.

        Args:
            bitmap: the bitmap to report into, by `IovaBitmap.set` or `IovaBitmap.set_many`.
            iova: the first IOVA of the queried range.
            length: the length of the queried range in bytes.

        Raises:
            TrackerError: the tracker is not watching.
        """


class EmulatedTracker(DirtyTracker):
    """A tracker in software: the base class of every tracker that ``--tracker`` can select.

    A subclass defines `name`, `dma` and the methods of `DirtyTracker`. The device process makes one
    object for each session, without arguments, and uses it in one thread.

    Example:
        >>> class AllDirty(EmulatedTracker):
        ...     name = "all-dirty"
        ...
        ...     def start(self, ranges, page_size):
        ...         return page_size
        ...
        ...     def stop(self):
        ...         pass
        ...
        ...     def dma(self, iova, length):
        ...         pass
        ...
        ...     def read_and_clear(self, bitmap, iova, length):
        ...         bitmap.set(iova, length)
    """

    name: ClassVar[str]
    """The tracker's name: the value of the option ``--tracker``."""

    @abstractmethod
    def dma(self, iova: int, length: int) -> None:
        """Record a write of the device. Its data is already in RAM.

        The tracker ignores the call if it is not watching.

        Args:
            iova: the first IOVA of the write.
            length: the number of bytes written, at least 1.
        """
