"""The driver's side of a split virtqueue (virtio 1.2, section 2.7) in guest memory.

Descriptors are handed out in the order of the table, which VIRTIO_F_IN_ORDER requires.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .memory import GuestMemory

DESCRIPTOR: Final = struct.Struct("<QIHH")
_INDEX: Final = struct.Struct("<H")
_USED: Final = struct.Struct("<II")
RING_OFFSET: Final = 4
"""Where the entries of the avail and the used ring begin, after flags and index."""
_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
MOST_INDIRECT: Final = 4
"""The number of descriptors that an indirect table has room for."""


@dataclass(frozen=True)
class Buffer:
    """A part of a chain: a bus address and a length in bytes."""

    bus: int
    length: int
    writable: bool = True


@dataclass(frozen=True)
class Layout:
    """The size of a ring, and the bus addresses of its parts.

    Attributes:
        size: the number of descriptors, a power of two.
        descriptors: the descriptor table, aligned to 16.
        avail: the avail ring, aligned to 2.
        used: the used ring, aligned to 4.
        tables: room for an indirect table of `MOST_INDIRECT` descriptors for each descriptor.
    """

    size: int
    descriptors: int
    avail: int
    used: int
    tables: int

    @property
    def used_bytes(self) -> int:
        """The length of the used ring, with the avail event at its end."""
        return RING_OFFSET + self.size * _USED.size + _INDEX.size


def used_bytes_before(entry: int) -> int:
    """Return the number of bytes of a used ring before an entry."""
    return RING_OFFSET + entry * _USED.size


class Ring:
    """A virtqueue, whose chains the device uses in order."""

    def __init__(self, memory: GuestMemory, layout: Layout, start: int = 0) -> None:
        """Make the ring; `start` is the index of the first chain."""
        self._memory = memory
        self.layout = layout
        self.start = start
        self._index = start
        self._descriptor = start % layout.size
        self._outstanding: deque[tuple[int, int]] = deque()  # descriptors and bytes of each chain
        self._reclaimed = start
        memory.write(layout.descriptors, bytes(layout.size * DESCRIPTOR.size))
        memory.write(layout.avail, bytes(6 + 2 * layout.size))
        memory.write(layout.used, struct.pack("<HH", 0, start % 65536))
        self._publish()

    @property
    def free(self) -> int:
        """The number of free descriptors."""
        return self.layout.size - sum(count for count, _ in self._outstanding)

    @property
    def capacities(self) -> list[int]:
        """The bytes of each chain that the device has not used yet."""
        return [capacity for _, capacity in self._outstanding]

    def add(self, chain: Sequence[Buffer], *, indirect: bool = False) -> None:
        """Make a chain available."""
        first = self._descriptor
        numbers = range(len(chain)) if indirect else self._numbers(len(chain))
        entries = [
            DESCRIPTOR.pack(
                buffer.bus,
                buffer.length,
                _WRITE * buffer.writable | _NEXT * (place + 1 < len(chain)),
                numbers[place + 1] if place + 1 < len(chain) else 0,
            )
            for place, buffer in enumerate(chain)
        ]
        if indirect:
            table = self.layout.tables + first * MOST_INDIRECT * DESCRIPTOR.size
            self._memory.write(table, b"".join(entries))
            length = len(chain) * DESCRIPTOR.size
            entries = [DESCRIPTOR.pack(table, length, _INDIRECT, 0)]
        for number, entry in zip(self._numbers(len(entries)), entries, strict=True):
            self._memory.write(self.layout.descriptors + number * DESCRIPTOR.size, entry)
        place = RING_OFFSET + 2 * (self._index % self.layout.size)
        self._memory.write(self.layout.avail + place, _INDEX.pack(first))
        self._descriptor = (first + len(entries)) % self.layout.size
        self._index += 1
        self._outstanding.append((len(entries), sum(buffer.length for buffer in chain)))
        self._publish()

    def _numbers(self, count: int) -> list[int]:
        return [(self._descriptor + place) % self.layout.size for place in range(count)]

    def _publish(self) -> None:
        self._memory.write(self.layout.avail + 2, _INDEX.pack(self._index % 65536))

    def used(self) -> int:
        """Return how many chains the device has used that were not reclaimed."""
        index = int.from_bytes(self._memory.read(self.layout.used + 2, _INDEX.size), "little")
        return (index - self._reclaimed) % 65536

    def is_taken(self) -> bool:
        """Return whether the device has taken all chains; it needs VIRTIO_F_EVENT_IDX.

        Then it asks for a notification of the next chain (virtio 1.2, section 2.7.10).
        """
        event = self.layout.used + self.layout.used_bytes - _INDEX.size
        return self._memory.read(event, _INDEX.size) == _INDEX.pack(self._index % 65536)

    def used_lengths(self) -> list[int]:
        """Return the bytes that the device has written to each chain that was not reclaimed."""
        places = ((self._reclaimed + number) % self.layout.size for number in range(self.used()))
        entries = (
            self._memory.read(self.layout.used + used_bytes_before(place), _USED.size)
            for place in places
        )
        return [_USED.unpack(entry)[1] for entry in entries]

    def reclaim(self) -> None:
        """Take back the chains that the device has used."""
        for _ in range(self.used()):
            self._outstanding.popleft()
            self._reclaimed += 1
