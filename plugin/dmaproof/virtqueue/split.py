"""The split ring (section 2.7): a descriptor table, an available ring and a used ring."""

from __future__ import annotations

import struct
from typing import Final

from .. import _core
from ..dma import Dma
from ..errors import ProtocolError
from ..journal import WriteKind
from .chain import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    F_INDIRECT,
    F_NEXT,
    DescriptorChain,
    RingAddresses,
    Segment,
    add_segment,
    check_ring,
    read_indirect_table,
)

_AVAIL_F_NO_INTERRUPT: Final = 1
_U16: Final = struct.Struct("<H")


class SplitVirtqueue:
    """The device's end of one split ring; see `Virtqueue`.

    Its base is the free-running index of the first request not yet taken.

    Raises:
        ProtocolError: the size is not a power of two up to `MAX_QUEUE_SIZE`, or a part is
            misaligned.
        MemoryAccessError: a part lies outside guest RAM.
    """

    def __init__(
        self,
        dma: Dma,
        addresses: RingAddresses,
        size: int,
        *,
        base: int = 0,
        event_index: bool = False,
        indirect: bool = False,
    ) -> None:
        check_ring(
            size,
            (
                ("descriptor table", addresses.descriptors, 16),
                ("available ring", addresses.driver, 2),
                ("used ring", addresses.device, 4),
            ),
        )
        if size & (size - 1):
            raise ProtocolError(f"queue size {size} of a split ring is not a power of two")
        self.size = size
        self._next_available = base & 0xFFFF
        self._dma = dma
        self._used_iova = addresses.device
        self._event_index = event_index
        self._indirect = indirect
        self._table = dma.view(addresses.descriptors, DESCRIPTOR_BYTES * size)
        # flags, idx, ring[size], used_event
        self._available = dma.view(addresses.driver, 6 + 2 * size)
        # flags, idx, ring[size] of (id, len), avail_event
        used = dma.view(addresses.device, 6 + 8 * size)
        self._next_used = int(used.unpack(_U16, 2)[0])
        self._signalled_used = self._next_used

    @property
    def base(self) -> int:
        return self._next_available

    def _available_at(self, index: int) -> int:
        """Return 16-bit field `index` of the available ring: flags, idx, ring[size], used_event."""
        value: int = self._available.unpack(_U16, 2 * index)[0]
        return value

    def pop(self) -> DescriptorChain | None:
        available = self._available_at(1)
        pending = (available - self._next_available) & 0xFFFF
        if pending == 0:
            return None
        if pending > self.size:
            raise ProtocolError(
                f"available index {available} is {pending} ahead of {self._next_available}, which "
                f"exceeds the {self.size} entries of the queue"
            )
        _core.fence()  # read the entry only after the index that publishes it
        chain = self.chain_at(self._available_at(2 + self._next_available % self.size))
        self._next_available = (self._next_available + 1) & 0xFFFF
        return chain

    @property
    def used_index(self) -> int:
        """The free-running index of the next used entry."""
        return self._next_used

    def resume_at(self, next_available: int) -> None:
        """Continue with the request whose free-running index is `next_available`."""
        self._next_available = next_available & 0xFFFF

    def chain_at(self, head: int) -> DescriptorChain:
        """Return the request whose first descriptor is `head`.

        Raises:
            ProtocolError: the chain breaks the specification.
            MemoryAccessError: an indirect table lies outside guest RAM.
            IotlbMissError: the IOMMU must be asked for an address first.
        """
        chain = DescriptorChain(head, 1)
        table: bytes | None = None  # the indirect table, once the chain has reached it
        entries, index, seen = self.size, head, 0
        while True:
            if index >= entries:
                raise ProtocolError(
                    f"descriptor {index} of request {head} is outside the table of {entries}"
                )
            seen += 1
            if seen > entries:
                raise ProtocolError(f"descriptor chain of request {head} loops")
            offset = DESCRIPTOR_BYTES * index
            iova, length, flags, following = (
                self._table.unpack(DESCRIPTOR, offset)
                if table is None
                else DESCRIPTOR.unpack_from(table, offset)
            )
            if flags & F_INDIRECT:
                # Section 2.7.5.3.2: the flag WRITE of an indirect descriptor is ignored.
                if not self._indirect or table is not None or flags & F_NEXT:
                    raise ProtocolError(
                        f"indirect descriptor of request {head} is nested, chained, or was not "
                        "negotiated"
                    )
                table = read_indirect_table(self._dma, head, iova, length)
                # The head in the ring does not count: the chain may be as long as the table.
                entries, index, seen = length // DESCRIPTOR_BYTES, 0, 0
                continue
            add_segment(chain, Segment(iova, length), flags)
            if not flags & F_NEXT:
                self._dma.require(chain.readable, chain.writable)
                return chain
            index = following

    def push(self, chain: DescriptorChain, written: int) -> None:
        slot = self._used_iova + 4 + 8 * (self._next_used % self.size)
        self._dma.write(slot, struct.pack("<II", chain.head, written), WriteKind.USED_RING)
        self._next_used = (self._next_used + 1) & 0xFFFF
        _core.fence()  # the entry must be in RAM before the index that publishes it
        index = struct.pack("<H", self._next_used)
        self._dma.write(self._used_iova + 2, index, WriteKind.USED_RING)

    def wants_interrupt(self) -> bool:
        """Return whether the driver wants an interrupt.

        Section 2.7.7.2: with an event index, it does if the used index has passed used_event;
        without one, unless it set VIRTQ_AVAIL_F_NO_INTERRUPT.
        """
        _core.fence()  # write the used index before reading used_event (section 2.7.13.4.1)
        before, self._signalled_used = self._signalled_used, self._next_used
        if not self._event_index:
            return before != self._next_used and not self._available_at(0) & _AVAIL_F_NO_INTERRUPT
        used_event = self._available_at(2 + self.size)
        return (self._next_used - used_event - 1) & 0xFFFF < (self._next_used - before) & 0xFFFF

    def ask_for_kick(self) -> bool:
        if self._event_index:
            self._dma.write(
                self._used_iova + 4 + 8 * self.size,
                struct.pack("<H", self._next_available),
                WriteKind.USED_RING,
            )
            _core.fence()  # write avail_event before reading the available index again
        return self._available_at(1) != self._next_available
