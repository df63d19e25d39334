"""Descriptors and descriptor chains, which split and packed rings have in common.

A descriptor has 16 bytes in both forms: address, length, and two 16-bit fields. These are *flags*
and *next* in a split ring, *id* and *flags* in a packed ring.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from ..dma import Dma
from ..errors import ProtocolError

DESCRIPTOR: Final = struct.Struct("<QIHH")
DESCRIPTOR_BYTES: Final = DESCRIPTOR.size
MAX_QUEUE_SIZE: Final = 32768
"""The largest size of a split ring (section 2.7) and of a packed ring (section 2.8.10.1)."""

F_NEXT: Final = 1
F_WRITE: Final = 2
F_INDIRECT: Final = 4


class Segment(NamedTuple):
    """A buffer of a request."""

    iova: int
    """The first IOVA."""
    length: int
    """The number of bytes."""


class PackedDescriptor(NamedTuple):
    """A descriptor of a packed ring, as the driver wrote it."""

    iova: int
    length: int
    buffer_id: int
    flags: int


@dataclass(frozen=True)
class DescriptorChain:
    """One request: the buffers that the device may read, followed by those that it may write.

    `head` identifies the request to the driver: it is the index of the first descriptor in a split
    ring, and the buffer ID in a packed ring. `descriptors` is the number of ring descriptors that
    the request takes; for a packed ring `packed` has their content.
    """

    head: int
    descriptors: int
    readable: list[Segment] = field(default_factory=list)
    writable: list[Segment] = field(default_factory=list)
    packed: list[PackedDescriptor] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class RingAddresses:
    """IOVAs of a ring's three areas, under the specification's names.

    ============  ================  ===============
    area          split ring        packed ring
    ============  ================  ===============
    descriptors   descriptor table  descriptor ring
    driver        available ring    driver's event suppression
    device        used ring         device's event suppression
    ============  ================  ===============
    """

    descriptors: int
    driver: int
    device: int


class Virtqueue(Protocol):
    """The device's end of one ring."""

    @property
    def size(self) -> int:
        """The number of descriptors in the ring."""

    @property
    def base(self) -> int:
        """The ring's position, in the form of SET_VRING_BASE and GET_VRING_BASE."""

    def pop(self) -> DescriptorChain | None:
        """Take the next request; return None when the driver has made no more available.

        All of the request's addresses are known: behind an IOMMU, it can be served without a miss.

        Raises:
            ProtocolError: the ring or the chain breaks the specification.
            MemoryAccessError: an indirect table lies outside guest RAM.
            IotlbMissError: the IOMMU must be asked for an address first; the next call returns the
                same request.
        """

    def push(self, chain: DescriptorChain, written: int) -> None:
        """Return a request to the driver; the device wrote `written` bytes into its buffers."""

    def wants_interrupt(self) -> bool:
        """Return whether the requests pushed since the last call need an interrupt."""

    def ask_for_kick(self) -> bool:
        """Ask for a kick at the next request; return True if a request is already available."""


def check_ring(size: int, parts: tuple[tuple[str, int, int], ...]) -> None:
    """Check a ring of `size` with `parts` (name, IOVA, required alignment in bytes).

    Raises:
        ProtocolError: the size is not possible, or a part is misaligned.
    """
    if not 0 < size <= MAX_QUEUE_SIZE:
        raise ProtocolError(f"queue size {size} is not between 1 and {MAX_QUEUE_SIZE}")
    for name, address, alignment in parts:
        if address % alignment:
            raise ProtocolError(f"{name} at {address:#x} is not aligned to {alignment} bytes")


def add_segment(chain: DescriptorChain, segment: Segment, flags: int) -> None:
    """Append the buffer of a descriptor with `flags` to the chain.

    Raises:
        ProtocolError: the buffer is readable and follows a writable one.
    """
    if flags & F_WRITE:
        chain.writable.append(segment)
    elif chain.writable:
        raise ProtocolError(f"request {chain.head} has a readable descriptor after a writable one")
    else:
        chain.readable.append(segment)


def read_indirect_table(dma: Dma, head: int, iova: int, length: int) -> bytes:
    """Copy the indirect table of request `head`, because the driver could change it meanwhile.

    Raises:
        ProtocolError: `length` (bytes) is not the length of a table.
        MemoryAccessError: the table lies outside guest RAM.
        IotlbMissError: the IOMMU must be asked for pages of the table first.
    """
    if length == 0 or length % DESCRIPTOR_BYTES or length > MAX_QUEUE_SIZE * DESCRIPTOR_BYTES:
        raise ProtocolError(
            f"indirect table of request {head} has {length} bytes; expected {DESCRIPTOR_BYTES} for "
            f"each of 1 to {MAX_QUEUE_SIZE} descriptors"
        )
    dma.require([(iova, length)], [])  # ask for all missing pages at once
    return dma.read(iova, length)
