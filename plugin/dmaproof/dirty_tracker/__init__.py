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
from collections.abc import Callable

from ..discovery import named_classes
from .tracker import DirtyTracker, EmulatedTracker

__all__ = ["DirtyTracker", "EmulatedTracker", "emulated_trackers"]


def emulated_trackers() -> dict[str, Callable[[], EmulatedTracker]]:
    """The trackers of this package by name; call one to make a tracker of its default form."""
    return dict(named_classes(sys.modules[__name__]))
