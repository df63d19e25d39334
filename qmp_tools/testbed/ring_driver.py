"""A guest's driver: guest RAM in a memfd, with a split or a packed ring that it fills and reads.

The driver is written from the driver's side of the specification (virtio 1.2, sections 2.7 and
2.8), without the device's code, so that tests detect where the two disagree.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from dmaproof.guest_memory import Bus, GuestMemory, IovaMap, map_slot
from dmaproof.units import PAGE_BYTES, div_ceil

PAGE: Final = PAGE_BYTES
NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
ENABLED, DISABLED, AT_DESCRIPTOR = 0, 1, 2

HVA_BASE = 0x7F00_0000_0000


@dataclass(frozen=True)
class Buffer:
    """A descriptor as a driver writes it; only a split ring uses `following`."""

    address: int
    length: int
    flags: int = 0
    following: int = 0

    def pack(self) -> bytes:
        """Return the 16 bytes for the table of a split ring."""
        return struct.pack("<QIHH", self.address, self.length, self.flags, self.following)


@contextmanager
def ram_fd(length: int) -> Iterator[int]:
    """Open a memfd of `length` bytes."""
    fd = os.memfd_create("guest-ram")
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


def guest_memory(fd: int, *places: tuple[int, int, int]) -> GuestMemory:
    """Return guest memory with slots of `fd` at (GPA, length, file offset)."""
    return GuestMemory(
        map_slot(fd, gpa=gpa, length=length, hva=HVA_BASE + gpa, file_offset=offset)
        for gpa, length, offset in places
    )


class Driver:
    """The common part of the drivers of both ring forms: guest RAM, and a ring at an address.

    `descriptors`, `available` and `used` are the addresses of the ring's parts, with the names that
    SET_VRING_ADDR uses. `base` is the start index for SET_VRING_BASE. `bus` maps the driver's
    addresses to GPAs. Both are equal unless the ring lies on scattered pages.
    """

    base = 0
    bus: Bus

    def __init__(self, memory: GuestMemory, base: int, size: int) -> None:
        self.memory = memory
        self.bus = IovaMap.identity(memory)
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = base + PAGE * div_ceil(self.available + 6 + 2 * size - base, PAGE)
        self.used_bytes = 6 + 8 * size
        self.event_index = False

    @property
    def pages(self) -> list[int]:
        """The GPAs of the pages of the ring, in the order of the driver's addresses."""
        first, end = self.descriptors // PAGE, div_ceil(self.used + self.used_bytes, PAGE)
        return [self.bus.translate(page * PAGE, PAGE)[0][0] for page in range(first, end)]

    def write(self, address: int, data: bytes) -> None:
        """Write `data` to guest RAM."""
        rest = data
        for gpa, size in self.bus.translate(address, len(data)):
            self.memory.view(gpa, size)[:] = rest[:size]
            rest = rest[size:]

    def read(self, address: int, length: int) -> bytes:
        """Read bytes from guest RAM."""
        pieces = self.bus.translate(address, length)
        return b"".join(bytes(self.memory.view(*piece)) for piece in pieces)

    def submit(self, buffers: Sequence[Buffer], table: int | None = None) -> int:
        """Make one request available, in an indirect table at GPA `table` if there is one.

        Of the buffers' flags only WRITE may be set. Returns the request's number, which `collect`
        returns when the request has been completed.
        """
        raise NotImplementedError

    def collect(self) -> list[tuple[int, int]]:
        """Return the requests that were completed since the last call: number, bytes written."""
        raise NotImplementedError

    def interrupt(self, *, wanted: bool, after: int | None = None) -> None:
        """Enable or disable interrupts.

        With an event index, ask for one interrupt after `after` more descriptors (packed ring) or
        requests (split ring) have been completed.
        """
        raise NotImplementedError


class RingDriver(Driver):
    """The driver's end of a split ring of `size` entries that begins at `base`."""

    def __init__(self, memory: GuestMemory, base: int, size: int = 8, next_index: int = 0) -> None:
        super().__init__(memory, base, size)
        self._next = next_index
        self._seen = 0
        self._free = list(range(size))
        self._taken: dict[int, list[int]] = {}
        self._flags = 0
        self._used_event = 0

    def submit(self, buffers: Sequence[Buffer], table: int | None = None) -> int:
        places = [self._free.pop(0) for _ in (buffers if table is None else [0])]
        self._taken[places[0]] = places
        if table is not None:
            self.describe(self.chain(buffers), table)
            whole = Buffer(table, 16 * len(buffers), INDIRECT)
            self.write(self.descriptors + 16 * places[0], whole.pack())
        else:
            for buffer, place, following in zip(buffers, places, [*places[1:], None], strict=True):
                linked = buffer
                if following is not None:
                    linked = replace(buffer, flags=buffer.flags | NEXT, following=following)
                self.write(self.descriptors + 16 * place, linked.pack())
        self.publish(places[0], flags=self._flags, used_event=self._used_event)
        return places[0]

    def collect(self) -> list[tuple[int, int]]:
        done = []
        while self._seen != self.used_index:
            head, written = self.used_element(self._seen)
            self._seen = (self._seen + 1) & 0xFFFF
            self._free += self._taken.pop(head)
            done.append((head, written))
        return done

    def interrupt(self, *, wanted: bool, after: int | None = None) -> None:
        self._flags = int(not wanted)
        ahead = (after or 1) - 1 if wanted else 0x8000
        self._used_event = (self._seen + ahead) & 0xFFFF
        self.publish(flags=self._flags, used_event=self._used_event)

    def describe(self, buffers: Sequence[Buffer], table: int | None = None) -> None:
        """Write descriptors from the start of the table."""
        start = self.descriptors if table is None else table
        for index, buffer in enumerate(buffers):
            self.write(start + 16 * index, buffer.pack())

    def chain(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Return the same buffers, each linked to the next."""
        return [
            Buffer(
                buffer.address,
                buffer.length,
                buffer.flags | (NEXT if index < len(buffers) - 1 else 0),
                index + 1,
            )
            for index, buffer in enumerate(buffers)
        ]

    def publish(self, *heads: int, flags: int = 0, used_event: int = 0) -> None:
        """Make requests available."""
        for head in heads:
            self.write(self.available + 4 + 2 * (self._next % self.size), struct.pack("<H", head))
            self._next = (self._next + 1) & 0xFFFF
        self.write(self.available + 4 + 2 * self.size, struct.pack("<H", used_event))
        self.write(self.available, struct.pack("<HH", flags, self._next))

    @property
    def available_index(self) -> int:
        """The available ring's free-running index."""
        return self._next

    @property
    def used_index(self) -> int:
        """The used ring's free-running index."""
        return int.from_bytes(self.read(self.used + 2, 2), "little")

    def used_element(self, position: int) -> tuple[int, int]:
        """Return head and length of a used entry."""
        head, length = struct.unpack(
            "<II", self.read(self.used + 4 + 8 * (position % self.size), 8)
        )
        return head, length


class PackedDriver(Driver):
    """The driver's end of a packed ring of `size` descriptors that begins at `base`."""

    base = 0x8000_8000

    def __init__(self, memory: GuestMemory, base: int, size: int = 8) -> None:
        super().__init__(memory, base, size)
        self.available = (base + 16 * size + 3) // 4 * 4
        self.used_bytes = 4
        self._next, self._wrap = 0, True
        self._seen, self._seen_wrap = 0, True
        self._ids = list(range(size))
        self._taken: dict[int, int] = {}
        self.room = size

    def put(self, index: int, buffer: Buffer, buffer_id: int, flags: int) -> None:
        """Write a descriptor to the ring, with its flags last."""
        place = self.descriptors + 16 * index
        self.write(place, struct.pack("<QIH", buffer.address, buffer.length, buffer_id))
        self.write(place + 14, struct.pack("<H", flags))

    def submit(self, buffers: Sequence[Buffer], table: int | None = None) -> int:
        if table is not None:
            for index, buffer in enumerate(buffers):
                packed = struct.pack("<QIHH", buffer.address, buffer.length, 0xBAD, buffer.flags)
                self.write(table + 16 * index, packed)
            buffers = [Buffer(table, 16 * len(buffers), INDIRECT)]
        assert len(buffers) <= self.room
        self.room -= len(buffers)
        buffer_id = self._ids.pop(0)
        self._taken[buffer_id] = len(buffers)
        planned = []
        for number, buffer in enumerate(buffers):
            last = number == len(buffers) - 1
            owner = AVAIL if self._wrap else USED
            flags = buffer.flags | owner | (0 if last else NEXT)
            planned.append((self._next, buffer, buffer_id if last else 0xBAD, flags))
            self._next, self._wrap = self._after(self._next, self._wrap, 1)
        for entry in reversed(planned):  # the first entry makes all of them available
            self.put(*entry)
        return buffer_id

    def _after(self, index: int, wrap: bool, descriptors: int) -> tuple[int, bool]:
        index += descriptors
        return (index, wrap) if index < self.size else (index - self.size, not wrap)

    def collect(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while True:
            place = self.descriptors + 16 * self._seen
            _, length, buffer_id, flags = struct.unpack("<QIHH", self.read(place, 16))
            if bool(flags & AVAIL) != self._seen_wrap or bool(flags & USED) != self._seen_wrap:
                return done
            descriptors = self._taken.pop(buffer_id)
            self._ids.append(buffer_id)
            self.room += descriptors
            self._seen, self._seen_wrap = self._after(self._seen, self._seen_wrap, descriptors)
            done.append((buffer_id, length if flags & WRITE else 0))

    def interrupt(self, *, wanted: bool, after: int | None = None) -> None:
        index, wrap = self._after(self._seen, self._seen_wrap, (after or 1) - 1)
        flags = (AT_DESCRIPTOR if self.event_index else ENABLED) if wanted else DISABLED
        self.write(self.available, struct.pack("<HH", index | wrap << 15, flags))
