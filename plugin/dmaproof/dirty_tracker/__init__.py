"""Dirty trackers: what hardware remembers of the pages it wrote, each in its own form.

A tracker stands between a device's DMA and the iterator. It is told which IOVA ranges to watch, and
when asked reports what was written there since it was asked last, through `IovaBitmap.set` or
`IovaBitmap.set_many`, and forgets it. It may report more than was written (hardware knows coarse
pages and whole words), never less.

Each kind of hardware is one file of this package with one class that has a `name`;
`emulated_trackers` finds them by walking the package, so new hardware is one new file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from ..discovery import named_classes
from ..iova_bitmap import IovaBitmap, IovaRange


class DirtyTracker(Protocol):
    """What the collector needs of a tracker; the order of calls is start, read_and_clear…, stop."""

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Watch `ranges` with pages of `page_size` bytes; nothing is dirty at first.

        Returns the page size in bytes that is really used: hardware may not have the wanted one.

        Raises:
            TrackerError: it watches already, or cannot watch these ranges.
        """

    def stop(self) -> None:
        """Watch no more, and forget what is dirty; harmless when not watching."""

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report into `bitmap` what is dirty in `length` bytes from `iova` on, and forget it.

        Raises:
            TrackerError: it is not watching.
        """


class EmulatedTracker(DirtyTracker, Protocol):
    """A tracker in software, told of each write by the device that makes it."""

    name: ClassVar[str]

    def dma(self, iova: int, length: int) -> None:
        """The device wrote `length` bytes at `iova`; ignored where it is not watching."""


def emulated_trackers() -> dict[str, Callable[[], EmulatedTracker]]:
    """The trackers of this package by name; call one to make a tracker of its default form."""
    return dict(named_classes(sys.modules[__name__]))
