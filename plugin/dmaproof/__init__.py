"""The device's side of a live migration, without QEMU: dirty trackers, the iterator, the dirty log.

A device writes guest RAM by DMA. A *dirty tracker* records which pages were written, in the form of
its hardware. At each *harvest* a collector queries the tracker through an `IovaBitmap`, translates
IOVAs to guest-physical addresses, and sets bits in the *dirty log*. From the log QEMU learns which
pages it has to send again. This package uses neither QEMU processes nor QMP; `qmp_tools` does.

Report dirty ranges
-------------------
Through an `IovaBitmap`, a tracker reports ranges without knowing where the bits are stored:

>>> from dmaproof import IovaBitmap
>>> with IovaBitmap(0x10000, 0x8000, page_size=4096, data=bytearray(8)) as bitmap:
...     bitmap.set(0x11ff0, 0x20)
...     [(hex(iova), length) for iova, length in bitmap.ranges()]
[('0x11000', 8192)]

Run the chain
-------------
The chain needs guest RAM in a file, a tracker and a log:

>>> import os
>>> from dmaproof import BufferDirtyLog, Collector, Dma, GuestMemory, IovaMap, Journal
>>> from dmaproof import emulated_trackers, map_slot
>>> ram = os.memfd_create("ram")
>>> os.ftruncate(ram, 1 << 20)
>>> slot = map_slot(ram, gpa=0, length=1 << 20, hva=0, file_offset=0)
>>> os.close(ram)
>>> memory = GuestMemory([slot])
>>> bus = IovaMap.identity(memory)
>>> tracker = emulated_trackers()["iommu"]()
>>> collector = Collector(tracker)
>>> dma = Dma(memory, bus, tracker, Journal(), due_epoch=collector.due_epoch)
>>> log = bytearray(32)  # a bit for each of the 256 pages
>>> collector.start(BufferDirtyLog(log), memory, bus)
>>> dma.write(0x5000, b"a page that must be sent again")
>>> collector.harvest()
1
>>> log[0] == 1 << 5
True

Add a tracker, a device or a fault
----------------------------------
`EmulatedTracker`, `VirtioDevice` and `Fault` are the base classes. To add a class of your own, name
it as an entry point in the ``pyproject.toml`` of your distribution. Every command that takes a name
then finds it:

.. code-block:: toml

    [project.entry-points."dmaproof.trackers"]
    page-list = "my_module:PageList"  # PageList.name is "page-list"

The groups are ``dmaproof.trackers``, ``dmaproof.devices`` and ``dmaproof.faults``. dmaproof imports
such a module only when its class is used.

Errors and logs
---------------
Every exception that the package raises on purpose is a `DmaproofError`. The package logs to the
logger ``dmaproof``, which is silent until an application configures logging.

What is public
--------------
The names in ``__all__`` and ``__version__`` are public, and documented in the reference. Everything
else is private, submodules included, and may change in any release.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from .public_names import import_on_demand

if TYPE_CHECKING:
    from .collector import Collector, Harvest
    from .devices import VirtioDevice, emulated_devices, make_device
    from .devices.segments import gather, scatter, take
    from .dirty_log import LOG_PAGE_BYTES, BufferDirtyLog, DirtyLog
    from .dirty_tracker import DirtyTracker, EmulatedTracker, emulated_trackers
    from .discovery import Registry
    from .dma import Dma
    from .errors import (
        BitmapError,
        DmaproofError,
        IotlbMissError,
        MemoryAccessError,
        ProtocolError,
        RefusedError,
        TrackerError,
        UnsupportedError,
        UntestableError,
        UsageError,
        WaitTimeoutError,
    )
    from .faults import Fault, known_faults, make_fault
    from .faults.fault import uniform
    from .guest_memory import Bus, GuestMemory, IovaMap, IovaMapping, MemorySlot, map_slot
    from .iova_bitmap import BitmapStats, IovaBitmap, IovaRange
    from .journal import Journal, WriteKind
    from .stamp import Stamp, read_stamp, stamped_page
    from .trace import Link, TracedBitmap
    from .vhost_user.server import Server
    from .vhost_user.session import Session
    from .virtqueue import DescriptorChain, Segment

    __version__: str

logging.getLogger("dmaproof").addHandler(logging.NullHandler())

# In the order of the reference (docs/reference.md), which names all of them.
__all__ = (  # noqa: RUF022
    # The iterator
    "IovaBitmap",
    "IovaRange",
    "BitmapStats",
    # Trackers
    "EmulatedTracker",
    "DirtyTracker",
    "emulated_trackers",
    # Devices
    "VirtioDevice",
    "Dma",
    "DescriptorChain",
    "Segment",
    "take",
    "gather",
    "scatter",
    "stamped_page",
    "read_stamp",
    "Stamp",
    "emulated_devices",
    "make_device",
    # Faults
    "Fault",
    "Link",
    "TracedBitmap",
    "uniform",
    "known_faults",
    "make_fault",
    # The chain from a write to the dirty log
    "Collector",
    "Harvest",
    "Journal",
    "WriteKind",
    "DirtyLog",
    "BufferDirtyLog",
    "LOG_PAGE_BYTES",
    "GuestMemory",
    "MemorySlot",
    "map_slot",
    "Bus",
    "IovaMap",
    "IovaMapping",
    # The vhost-user back end, and the registry of named classes
    "Server",
    "Session",
    "Registry",
    # Errors, most generic to most explicit
    "DmaproofError",
    "UsageError",
    "UntestableError",
    "UnsupportedError",
    "RefusedError",
    "WaitTimeoutError",
    "BitmapError",
    "TrackerError",
    "MemoryAccessError",
    "IotlbMissError",
    "ProtocolError",
)

_HOMES: Final = {
    "collector": ("Collector", "Harvest"),
    "devices": ("VirtioDevice", "emulated_devices", "make_device"),
    "devices.segments": ("gather", "scatter", "take"),
    "dirty_log": ("BufferDirtyLog", "DirtyLog", "LOG_PAGE_BYTES"),
    "dirty_tracker": ("DirtyTracker", "EmulatedTracker", "emulated_trackers"),
    "discovery": ("Registry",),
    "dma": ("Dma",),
    "errors": (
        *("BitmapError", "DmaproofError", "IotlbMissError", "MemoryAccessError", "ProtocolError"),
        *("RefusedError", "TrackerError", "UnsupportedError", "UntestableError", "UsageError"),
        "WaitTimeoutError",
    ),
    "faults": ("Fault", "known_faults", "make_fault"),
    "faults.fault": ("uniform",),
    "guest_memory": ("Bus", "GuestMemory", "IovaMap", "IovaMapping", "MemorySlot", "map_slot"),
    "iova_bitmap": ("BitmapStats", "IovaBitmap", "IovaRange"),
    "journal": ("Journal", "WriteKind"),
    "stamp": ("Stamp", "read_stamp", "stamped_page"),
    "trace": ("Link", "TracedBitmap"),
    "vhost_user.server": ("Server",),
    "vhost_user.session": ("Session",),
    "virtqueue": ("DescriptorChain", "Segment"),
}
"""Public names by the module that defines them."""

if not TYPE_CHECKING:  # otherwise any misspelt name would pass a type checker
    __getattr__, __dir__ = import_on_demand(globals(), _HOMES)
