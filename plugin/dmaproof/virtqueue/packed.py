"""The packed ring (section 2.8): one ring of descriptors that driver and device both write.

The flags AVAIL and USED of a descriptor say whether it belongs to the driver or to the device. They
are compared with a *wrap counter*, a bit that each side inverts whenever it reaches the end of the
ring. A descriptor is available if AVAIL is equal and USED unequal to the driver's counter, and used
if both are equal to the device's counter. The device may answer in any order. It writes each answer
at its own next position, and skips as many descriptors as the request took. So the device dirties
the descriptors themselves, and must log them.

Each side says in an *event suppression structure* of 4 bytes when the other shall notify it:
always, never, or when a certain descriptor is reached.

In this module a *position* counts descriptors over two rounds of the ring, from 0 to 2 * size - 1.
The wrap counter is 1 in the first round and 0 in the second, because both counters begin with 1.
"""

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
    F_WRITE,
    DescriptorChain,
    PackedDescriptor,
    RingAddresses,
    Segment,
    add_segment,
    check_ring,
    read_indirect_table,
)

INITIAL_BASE: Final = 0x8000_8000
"""Both indices 0, both wrap counters 1 (section 2.8.1)."""

_LENGTH_OFFSET, _FLAGS_OFFSET = 8, 14
_F_AVAIL: Final = 1 << 7
_F_USED: Final = 1 << 15

_U16: Final = struct.Struct("<H")
_EVENT: Final = struct.Struct("<HH")
_EVENTS_ENABLED, _EVENTS_DISABLED, _EVENTS_AT_DESCRIPTOR = 0, 1, 2
_WRAP: Final = 1 << 15


class PackedVirtqueue:
    """The device's end of one packed ring; see `Virtqueue`.

    Bits 0 to 15 of its base are the index and the wrap counter of the first request not yet taken,
    bits 16 to 31 those of the next used descriptor (vhost-user specification, "A vring state
    description").

    Raises:
        ProtocolError: the size is out of bounds, a part is misaligned, or the base is outside the
            ring.
        MemoryAccessError: a part lies outside guest RAM.
    """

    def __init__(
        self,
        dma: Dma,
        addresses: RingAddresses,
        size: int,
        *,
        base: int = INITIAL_BASE,
        event_index: bool = False,
        indirect: bool = False,
    ) -> None:
        check_ring(
            size,
            (
                ("descriptor ring", addresses.descriptors, 16),
                ("driver's event suppression structure", addresses.driver, 4),
                ("device's event suppression structure", addresses.device, 4),
            ),
        )
        self.size = size
        self._next_available = self._position(base & 0xFFFF)
        self._next_used = self._position(base >> 16)
        self._unsignalled = 0
        self._dma = dma
        self._descriptors_iova = addresses.descriptors
        self._own_event_iova = addresses.device
        self._event_index = event_index
        self._indirect = indirect
        self._ring = dma.view(addresses.descriptors, DESCRIPTOR_BYTES * size)
        self._drivers_event = dma.view(addresses.driver, _EVENT.size)
        self._own_event = dma.view(addresses.device, _EVENT.size)

    def _position(self, half: int) -> int:
        """Return the position of an index with its wrap counter in bit 15."""
        index = half & ~_WRAP
        if index >= self.size:
            raise ProtocolError(f"index {index} is outside the packed ring of {self.size}")
        return index if half & _WRAP else index + self.size

    def _half(self, position: int) -> int:
        """Return the index of a position, with its wrap counter in bit 15."""
        return position | _WRAP if position < self.size else position - self.size

    def _advanced(self, position: int, descriptors: int) -> int:
        return (position + descriptors) % (2 * self.size)

    @property
    def base(self) -> int:
        return self._half(self._next_available) | self._half(self._next_used) << 16

    def _is_available(self) -> bool:
        """Return whether the driver has made the descriptor at the next position available."""
        return self.is_available_at(
            self._next_available % self.size, self._next_available < self.size
        )

    def pop(self) -> DescriptorChain | None:
        if not self._is_available():
            return None
        _core.fence()  # read the rest of the descriptor only after its flags
        chain = self.chain_of(self._descriptors())
        self._next_available = self._advanced(self._next_available, chain.descriptors)
        return chain

    @property
    def used_place(self) -> tuple[int, bool]:
        """The index and the wrap counter of the next used descriptor."""
        return self._next_used % self.size, self._next_used < self.size

    def used_place_after(self, chain: DescriptorChain) -> tuple[int, bool]:
        """Return `used_place` as it will be once `chain` has been returned."""
        position = self._advanced(self._next_used, chain.descriptors)
        return position % self.size, position < self.size

    def is_available_at(self, index: int, wrap: bool) -> bool:
        """Return whether the descriptor at `index` is available in the round of `wrap`.

        If the descriptor has been used or made available again since, the answer is False.
        """
        (flags,) = self._ring.unpack(_U16, DESCRIPTOR_BYTES * index + _FLAGS_OFFSET)
        return bool(flags & _F_AVAIL) == wrap and bool(flags & _F_USED) != wrap

    def resume_at(self, index: int, wrap: bool, taken: int) -> None:
        """Continue with the next used descriptor at `index`, and `taken` descriptors in flight."""
        self._next_used = index if wrap else index + self.size
        self._next_available = self._advanced(self._next_used, taken)

    def chain_of(self, descriptors: list[PackedDescriptor]) -> DescriptorChain:
        """Return the request that `descriptors` make up.

        Raises:
            ProtocolError: the chain breaks the specification.
            MemoryAccessError: an indirect table lies outside guest RAM.
            IotlbMissError: the IOMMU must be asked for an address first.
        """
        # Only the last descriptor of a list has its buffer ID (section 2.8.6).
        chain = DescriptorChain(descriptors[-1].buffer_id, len(descriptors), packed=descriptors)
        for iova, length, _, flags in descriptors:
            if flags & F_INDIRECT:
                self._add_indirect(chain, iova, length)
            else:
                add_segment(chain, Segment(iova, length), flags)
        self._dma.require(chain.readable, chain.writable)
        return chain

    def _descriptors(self) -> list[PackedDescriptor]:
        """Return the descriptors of the next request."""
        found = []
        for ahead in range(self.size):
            index = (self._next_available + ahead) % self.size
            offset = DESCRIPTOR_BYTES * index
            descriptor = PackedDescriptor(*self._ring.unpack(DESCRIPTOR, offset))
            found.append(descriptor)
            if not descriptor.flags & F_NEXT:
                return found
        raise ProtocolError(f"a descriptor list does not end within the ring of {self.size}")

    def _add_indirect(self, chain: DescriptorChain, iova: int, length: int) -> None:
        if not self._indirect or chain.descriptors > 1:
            raise ProtocolError(
                f"indirect descriptor of request {chain.head} is chained or was not negotiated"
            )
        table = read_indirect_table(self._dma, chain.head, iova, length)
        # Section 2.8.7: the request is the whole table, in order; only the flag WRITE is valid.
        for piece_iova, piece_length, _, piece_flags in DESCRIPTOR.iter_unpack(table):
            if piece_flags & F_INDIRECT:
                raise ProtocolError(f"indirect descriptor of request {chain.head} is nested")
            add_segment(chain, Segment(piece_iova, piece_length), piece_flags)

    def push(self, chain: DescriptorChain, written: int) -> None:
        index = self._next_used % self.size
        iova = self._descriptors_iova + DESCRIPTOR_BYTES * index
        answer = struct.pack("<IH", written, chain.head)
        self._dma.write(iova + _LENGTH_OFFSET, answer, WriteKind.USED_RING)
        _core.fence()  # length and buffer ID must be in RAM before the flags that publish them
        flags = F_WRITE if written else 0
        if self._next_used < self.size:
            flags |= _F_AVAIL | _F_USED
        self._dma.write(iova + _FLAGS_OFFSET, struct.pack("<H", flags), WriteKind.USED_RING)
        self._next_used = self._advanced(self._next_used, chain.descriptors)
        self._unsignalled += chain.descriptors

    def wants_interrupt(self) -> bool:
        """Return whether the driver wants an interrupt (section 2.8.10).

        With an event index, it does if the descriptor it named is among those used since.
        """
        _core.fence()  # write the flags before reading the driver's request (section 2.8.21.3.1)
        used, self._unsignalled = self._unsignalled, 0
        offset, flags = self._drivers_event.unpack(_EVENT, 0)
        if not used or flags == _EVENTS_DISABLED:
            return False
        if not self._event_index or flags != _EVENTS_AT_DESCRIPTOR:
            return True
        awaited = offset & ~_WRAP if offset & _WRAP else offset + self.size
        first = self._next_used - used
        reached: bool = (awaited - first) % (2 * self.size) < used
        return reached

    def ask_for_kick(self) -> bool:
        suppression = (0, _EVENTS_ENABLED)
        if self._event_index:
            suppression = (self._half(self._next_available), _EVENTS_AT_DESCRIPTOR)
        if self._own_event.unpack(_EVENT, 0) != suppression:
            self._dma.write(self._own_event_iova, _EVENT.pack(*suppression), WriteKind.USED_RING)
            _core.fence()  # write the device's request before reading the ring again
        return self._is_available()
