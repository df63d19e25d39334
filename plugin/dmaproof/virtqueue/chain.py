"""What split and packed rings have in common: descriptors, and the chains that they make up.

A descriptor is 16 bytes in both: address, length, and two 16-bit fields, which are *flags* and
*next* in a split ring, *id* and *flags* in a packed one.
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
"""The largest size of a split ring (section 2.7) and of a packed one (section 2.8.10.1)."""

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
    """A descriptor as it stands in a packed ring, until its answer is written over it."""

    iova: int
    length: int
    buffer_id: int
    flags: int


@dataclass(frozen=True)
class DescriptorChain:
    """One request: what the device may read, and behind it what it may write.

    `head` names it to the driver: the first descriptor's index in a split ring, the buffer ID in a
    packed one. `descriptors` of the ring itself make it up; of a packed ring they are in `packed`.
    """

    head: int
    descriptors: int
    readable: list[Segment] = field(default_factory=list)
    writable: list[Segment] = field(default_factory=list)
    packed: list[PackedDescriptor] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class RingAddresses:
    """IOVAs of a ring's three parts, by what the specification calls them.

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
        """How many descriptors the ring has."""

    @property
    def base(self) -> int:
        """Where the ring stands, as SET_VRING_BASE takes it and GET_VRING_BASE answers it."""

    def pop(self) -> DescriptorChain | None:
        """The next request, or None when the driver has made no more available.

        All of its addresses are known: behind an IOMMU, it can be carried out without a miss.

        Raises:
            ProtocolError: the ring or the chain breaks the specification.
            MemoryAccessError: an indirect table lies outside guest RAM.
            IotlbMissError: the IOMMU has to be asked for some address first; the request is the
                next one still.
        """

    def push(self, chain: DescriptorChain, written: int) -> None:
        """Give a request back; the device wrote `written` bytes into its buffers."""

    def wants_interrupt(self) -> bool:
        """Whether the driver is to be told of what was pushed since this was asked last."""

    def ask_for_kick(self) -> bool:
        """Let the driver kick at the next request; True if one has already come in meanwhile."""


def check_ring(size: int, parts: tuple[tuple[str, int, int], ...]) -> None:
    """Refuse a ring of `size` whose `parts` are (name, IOVA, due alignment in bytes).

    Raises:
        ProtocolError: no ring can have this size, or a part is misaligned.
    """
    if not 0 < size <= MAX_QUEUE_SIZE:
        raise ProtocolError(f"queue size {size} is not between 1 and {MAX_QUEUE_SIZE}")
    for name, address, alignment in parts:
        if address % alignment:
            raise ProtocolError(f"{name} at {address:#x} is not aligned to {alignment} bytes")


def add_segment(chain: DescriptorChain, segment: Segment, flags: int) -> None:
    """Append what a descriptor with `flags` describes.

    Raises:
        ProtocolError: it is readable, and stands behind one that is writable.
    """
    if flags & F_WRITE:
        chain.writable.append(segment)
    elif chain.writable:
        raise ProtocolError(f"request {chain.head} has a readable descriptor behind a writable one")
    else:
        chain.readable.append(segment)


def read_indirect_table(dma: Dma, head: int, iova: int, length: int) -> bytes:
    """A copy of request `head`'s indirect table: the driver could change it while it is walked.

    Raises:
        ProtocolError: `length` (bytes) is not that of a table.
        MemoryAccessError: it lies outside guest RAM.
        IotlbMissError: the IOMMU has to be asked for some of its pages first.
    """
    if length == 0 or length % DESCRIPTOR_BYTES or length > MAX_QUEUE_SIZE * DESCRIPTOR_BYTES:
        raise ProtocolError(
            f"indirect table of request {head} has {length} bytes, not {DESCRIPTOR_BYTES} for "
            f"each of up to {MAX_QUEUE_SIZE} descriptors"
        )
    dma.require([(iova, length)], [])  # all of its pages are asked for at a time
    return dma.read(iova, length)
