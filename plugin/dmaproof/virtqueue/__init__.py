"""The device's side of virtqueues: split and packed rings behind one interface.

A `Virtqueue` takes requests out of guest RAM as `DescriptorChain`s and returns them to the driver.
Its two forms are `SplitVirtqueue` (OASIS virtio 1.2, section 2.7) and `PackedVirtqueue` (section
2.8); the driver chooses with VIRTIO_F_RING_PACKED.

The driver is not trusted. Every index, flag and length that is read from a ring is checked. A chain
that loops or nests raises a `ProtocolError`, and an address outside guest RAM raises a
`MemoryAccessError` from `Dma`. Reads go through read-only windows on the ring; behind an IOMMU the
ring's pages may be scattered over guest RAM. Writes to the ring are DMA writes like any other,
because QEMU must see them as dirty too.
"""

from .chain import (
    MAX_QUEUE_SIZE,
    DescriptorChain,
    PackedDescriptor,
    RingAddresses,
    Segment,
    Virtqueue,
)
from .packed import PackedVirtqueue
from .split import SplitVirtqueue

__all__ = [
    "MAX_QUEUE_SIZE",
    "DescriptorChain",
    "PackedDescriptor",
    "PackedVirtqueue",
    "RingAddresses",
    "Segment",
    "SplitVirtqueue",
    "Virtqueue",
]
