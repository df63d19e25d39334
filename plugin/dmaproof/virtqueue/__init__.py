"""Virtqueues seen from the device: split and packed rings behind one interface.

A `Virtqueue` takes requests out of guest RAM as `DescriptorChain`s and gives them back. Its two
forms are `SplitVirtqueue` (OASIS virtio 1.2, section 2.7) and `PackedVirtqueue` (section 2.8); the
driver chooses with VIRTIO_F_RING_PACKED.

The driver is not trusted: every index, flag and length that is read from a ring is checked, a
chain that loops or nests is a `ProtocolError`, and an address outside guest RAM a
`MemoryAccessError` from `Dma`. Reads go through read-only windows on the ring, whose pages may be
scattered over guest RAM behind an IOMMU; what the device writes there are DMA writes like any
other, since QEMU has to learn of them too.
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
