"""A guest driver: guest RAM in a memfd, with a split ring that it fills and reads."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dmaproof.guest_memory import GuestMemory, map_slot

PAGE = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4

HVA_BASE = 0x7F00_0000_0000


@dataclass(frozen=True)
class Buffer:
    """A descriptor as a driver writes it."""

    address: int
    length: int
    flags: int = 0
    following: int = 0

    def pack(self) -> bytes:
        """The 16 bytes in the table."""
        return struct.pack("<QIHH", self.address, self.length, self.flags, self.following)


@contextmanager
def ram_fd(length: int) -> Iterator[int]:
    """A memfd of `length` bytes."""
    fd = os.memfd_create("guest-ram")
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


def guest_memory(fd: int, *places: tuple[int, int, int]) -> GuestMemory:
    """Slots of `fd` at (GPA, length, file offset)."""
    return GuestMemory(
        map_slot(fd, gpa=gpa, length=length, hva=HVA_BASE + gpa, file_offset=offset)
        for gpa, length, offset in places
    )


class RingDriver:
    """The driver's end of a split ring of `size` entries that stands at GPA `base`."""

    def __init__(self, memory: GuestMemory, base: int, size: int = 8) -> None:
        self.memory = memory
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = base + PAGE
        self._next = 0

    def write(self, gpa: int, data: bytes) -> None:
        """Put `data` into guest RAM."""
        self.memory.view(gpa, len(data))[:] = data

    def read(self, gpa: int, length: int) -> bytes:
        """Take bytes out of guest RAM."""
        return bytes(self.memory.view(gpa, length))

    def describe(self, buffers: Sequence[Buffer], table: int | None = None) -> None:
        """Write descriptors from the table's start."""
        start = self.descriptors if table is None else table
        for index, buffer in enumerate(buffers):
            self.write(start + 16 * index, buffer.pack())

    def chain(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """The same buffers, linked one to the next."""
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
        self.write(self.available, struct.pack("<HH", flags, self._next))
        self.write(self.available + 4 + 2 * self.size, struct.pack("<H", used_event))

    @property
    def used_index(self) -> int:
        """The used ring's free-running index."""
        return int.from_bytes(self.read(self.used + 2, 2), "little")

    def used_element(self, position: int) -> tuple[int, int]:
        """Head and length of a used entry."""
        head, length = struct.unpack(
            "<II", self.read(self.used + 4 + 8 * (position % self.size), 8)
        )
        return head, length
