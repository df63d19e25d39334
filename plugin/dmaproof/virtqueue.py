"""A split virtqueue seen from the device (OASIS virtio 1.2, section 2.7).

The driver is not trusted: every index, flag and length that is read from the ring is checked, a
chain that loops or nests is a `ProtocolError`, and an address outside guest RAM a
`MemoryAccessError` from `Dma`. Reads go through read-only views of the ring; writes to the used
ring are DMA writes like any other, since QEMU has to learn of them too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from . import _core
from .dma import Dma
from .errors import ProtocolError
from .journal import WriteKind

MAX_QUEUE_SIZE: Final = 32768
"""Section 2.7: the largest queue size that a split ring can have."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_DESC_F_NEXT: Final = 1
_DESC_F_WRITE: Final = 2
_DESC_F_INDIRECT: Final = 4
_AVAIL_F_NO_INTERRUPT: Final = 1


class Segment(NamedTuple):
    """`length` bytes at `iova`."""

    iova: int
    length: int


@dataclass(frozen=True)
class DescriptorChain:
    """One request: what the device may read, and behind it what it may write."""

    head: int
    readable: list[Segment] = field(default_factory=list)
    writable: list[Segment] = field(default_factory=list)


@dataclass(frozen=True)
class RingAddresses:
    """IOVAs of the three parts of a split ring."""

    descriptors: int
    available: int
    used: int


class Virtqueue:
    """The device's end of one split ring.

    `next_available` is the free-running index of the first request not yet taken (what
    GET_VRING_BASE answers).

    Raises:
        ProtocolError: the size is no power of two up to `MAX_QUEUE_SIZE`, or a part is misaligned.
        MemoryAccessError: a part lies outside guest RAM.
    """

    def __init__(
        self,
        dma: Dma,
        addresses: RingAddresses,
        size: int,
        *,
        next_available: int = 0,
        event_index: bool = False,
        indirect: bool = False,
    ) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ProtocolError(f"queue size {size} is not a power of two up to {MAX_QUEUE_SIZE}")
        for name, address, alignment in (
            ("descriptor table", addresses.descriptors, 16),
            ("available ring", addresses.available, 2),
            ("used ring", addresses.used, 4),
        ):
            if address % alignment:
                raise ProtocolError(f"{name} at {address:#x} is not aligned to {alignment} bytes")
        self.size = size
        self.next_available = next_available
        self._dma = dma
        self._used_iova = addresses.used
        self._event_index = event_index
        self._indirect = indirect
        self._table = dma.view(addresses.descriptors, 16 * size)
        # flags, idx, ring[size], used_event
        self._available = dma.view(addresses.available, 6 + 2 * size).cast("H")
        # flags, idx, ring[size] of (id, len), avail_event
        used = dma.view(addresses.used, 6 + 8 * size)
        self._next_used = int.from_bytes(used[2:4], "little")
        self._signalled_used = self._next_used

    def pop(self) -> DescriptorChain | None:
        """The next request, or None when the driver has made no more available.

        Raises:
            ProtocolError: the ring or the chain breaks the specification.
        """
        pending = (self._available[1] - self.next_available) & 0xFFFF
        if pending == 0:
            return None
        if pending > self.size:
            raise ProtocolError(
                f"available index {self._available[1]} is {pending} ahead of "
                f"{self.next_available}, more than the queue's {self.size} entries"
            )
        _core.fence()  # the entry may be read only after the index that publishes it
        head = self._available[2 + self.next_available % self.size]
        self.next_available = (self.next_available + 1) & 0xFFFF
        return self._chain(head)

    def _chain(self, head: int) -> DescriptorChain:
        chain = DescriptorChain(head)
        table, entries, index, seen = self._table, self.size, head, 0
        inside_indirect = False
        while True:
            if index >= entries:
                raise ProtocolError(f"descriptor {index} of request {head}: table has {entries}")
            seen += 1
            if seen > entries:
                raise ProtocolError(f"descriptor chain of request {head} loops")
            iova, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & _DESC_F_INDIRECT:
                if not self._indirect or inside_indirect or flags & (_DESC_F_NEXT | _DESC_F_WRITE):
                    raise ProtocolError(
                        f"indirect descriptor of request {head} is nested, chained, writable or "
                        "was not negotiated"
                    )
                if length == 0 or length % 16 or length // 16 > MAX_QUEUE_SIZE:
                    raise ProtocolError(
                        f"indirect table of request {head} has {length} bytes, not 16 for each of "
                        f"up to {MAX_QUEUE_SIZE} descriptors"
                    )
                # Copied: the driver could change it while it is walked.
                table = memoryview(self._dma.read(iova, length))
                # A head in the ring and its chain in the table may be as long as the table.
                entries, index, seen, inside_indirect = length // 16, 0, 0, True
                continue
            if flags & _DESC_F_WRITE:
                chain.writable.append(Segment(iova, length))
            elif chain.writable:
                raise ProtocolError(
                    f"request {head} has a readable descriptor behind a writable one"
                )
            else:
                chain.readable.append(Segment(iova, length))
            if not flags & _DESC_F_NEXT:
                return chain
            index = following

    def push(self, head: int, written: int) -> None:
        """Give the request `head` back; the device wrote `written` bytes into its buffers."""
        slot = self._used_iova + 4 + 8 * (self._next_used % self.size)
        self._dma.write(slot, struct.pack("<II", head, written), WriteKind.USED_RING)
        self._next_used = (self._next_used + 1) & 0xFFFF
        _core.fence()  # the entry must be in RAM before the index that publishes it
        index = struct.pack("<H", self._next_used)
        self._dma.write(self._used_iova + 2, index, WriteKind.USED_RING)

    def wants_interrupt(self) -> bool:
        """Whether the driver is to be told of what was pushed since this was asked last.

        Section 2.7.7.2: with an event index, when used_event was passed; else unless the driver
        set VIRTQ_AVAIL_F_NO_INTERRUPT.
        """
        _core.fence()  # used index written before used_event is read (section 2.7.13.4.1)
        before, self._signalled_used = self._signalled_used, self._next_used
        if not self._event_index:
            return before != self._next_used and not self._available[0] & _AVAIL_F_NO_INTERRUPT
        used_event = self._available[2 + self.size]
        return (self._next_used - used_event - 1) & 0xFFFF < (self._next_used - before) & 0xFFFF

    def ask_for_kick(self) -> bool:
        """Let the driver kick at the next request; True if one has already come in meanwhile."""
        if self._event_index:
            self._dma.write(
                self._used_iova + 4 + 8 * self.size,
                struct.pack("<H", self.next_available),
                WriteKind.USED_RING,
            )
            _core.fence()  # avail_event written before the available index is read again
        return self._available[1] != self.next_available
