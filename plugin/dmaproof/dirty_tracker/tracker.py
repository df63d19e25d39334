"""What a dirty tracker is: the calls of the collector, and those of a device in software."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from ..iova_bitmap import IovaBitmap, IovaRange


class DirtyTracker(Protocol):
    """What the collector needs of a tracker, whoever implements it: the kernel, or software.

    The order of calls is `start`, then `read_and_clear` as often as wanted, then `stop`.
    """

    @abstractmethod
    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Watch IOVA ranges; no page is dirty at first.

        Args:
            ranges: the ranges to watch, which do not overlap.
            page_size: the wanted page size in bytes, a power of two.

        Returns:
            The page size in bytes that the tracker uses: hardware may not have the wanted one.

        Raises:
            TrackerError: the tracker watches already, or cannot watch these ranges.
        """

    @abstractmethod
    def stop(self) -> None:
        """Watch no more, and forget what is dirty; harmless when not watching."""

    @abstractmethod
    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report dirty ranges into a bitmap, and forget them.

        The tracker may report more than was written, as hardware with coarse pages does, and never
        less.

        Args:
            bitmap: takes the report by `IovaBitmap.set` or `IovaBitmap.set_many`.
            iova: the IOVA at which the queried range begins.
            length: the length of the queried range in bytes.

        Raises:
            TrackerError: the tracker is not watching.
        """


class EmulatedTracker(DirtyTracker):
    """A tracker in software: the base class of every tracker that a proof can name.

    A subclass has a `name`, and the methods of `DirtyTracker` and `dma`. The device process makes
    one object for each session, without arguments. An object is used by one thread.

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
    """What users call it by: the value of option ``--tracker``."""

    @abstractmethod
    def dma(self, iova: int, length: int) -> None:
        """Remember a write of the device, whose data is in RAM already.

        The call is ignored when the tracker is not watching.

        Args:
            iova: the IOVA at which the device wrote.
            length: the number of bytes written, at least 1.
        """
