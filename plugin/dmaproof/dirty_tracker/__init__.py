"""Dirty trackers: the forms in which different hardware records the pages that a device writes.

A tracker stands between a device's DMA and the iterator. `start` gives the tracker the IOVA ranges
to watch. `read_and_clear` makes it report the pages written since the last query, through
`IovaBitmap.set` or `IovaBitmap.set_many`, and forget them. A tracker may report more than was
written (hardware uses coarse pages and whole words), never less.

Each kind of hardware is one file of this package, which has one class with a `name`. So new
hardware needs one new file. `emulated_trackers` finds these classes and those of other
distributions.
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
        The classes by name. A class called without arguments makes a tracker with its defaults.

    Example:
        >>> tracker = emulated_trackers()["iommu"]()
        >>> tracker.start([IovaRange(0, 1 << 20)], 4096)
        4096
    """
    return Registry("tracker", EmulatedTracker, sys.modules[__name__])
