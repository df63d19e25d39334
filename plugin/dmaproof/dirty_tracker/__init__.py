"""Dirty trackers: what hardware remembers of the pages it wrote, each in its own form.

A tracker stands between a device's DMA and the iterator. It is told which IOVA ranges to watch, and
when asked reports what was written there since it was asked last, through `IovaBitmap.set` or
`IovaBitmap.set_many`, and forgets it. It may report more than was written (hardware knows coarse
pages and whole words), never less.

Each kind of hardware is one file of this package with one class that has a `name`, so new hardware
is one new file. `emulated_trackers` finds them, and those of other distributions.
"""

from __future__ import annotations

import functools
import sys

from ..discovery import Registry
from .tracker import DirtyTracker, EmulatedTracker

__all__ = ["DirtyTracker", "EmulatedTracker", "emulated_trackers"]


@functools.cache
def emulated_trackers() -> Registry[EmulatedTracker]:
    """Find the trackers: dmaproof's own, and those of entry points (group ``dmaproof.trackers``).

    Returns:
        The classes by name; call one to make a tracker of its default form.

    Example:
        >>> tracker = emulated_trackers()["iommu"]()
        >>> tracker.start([IovaRange(0, 1 << 20)], 4096)
        4096
    """
    return Registry("tracker", EmulatedTracker, sys.modules[__name__])
