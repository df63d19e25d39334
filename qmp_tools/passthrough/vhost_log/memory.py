"""Guest memory with its dirty log, and the comparison of the changed pages with the log.

A device uses *bus addresses*. Without an IOTLB they are guest addresses. With an IOTLB they are
I/O addresses: neighbouring ones are pages of the guest in random order, so an address of the wrong
kind in the log is the address of another page.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES
from dmaproof.vfio.requests import address_of

from .abi import MEMORY, REGION

_BUS_PAGE: Final = 1 << 20
"""The first page of the I/O addresses, beyond all guest addresses."""
_LOG_GUARD_BYTES: Final = PAGE_BYTES
"""The bytes after the log, in which a bit beyond the memory shows."""


@dataclass(frozen=True)
class Region:
    """Guest memory that is contiguous, in pages."""

    page: int
    pages: int


@dataclass(frozen=True)
class Comparison:
    """The guest pages that changed, and those with a bit in the log."""

    changed: frozenset[int]
    logged: frozenset[int]

    @property
    def lost(self) -> frozenset[int]:
        """The pages that changed without a bit."""
        return self.changed - self.logged

    @property
    def unchanged(self) -> frozenset[int]:
        """The pages with a bit that did not change; a migration sends them needlessly."""
        return self.logged - self.changed

    def without(self, page: int) -> Comparison:
        """Return the comparison as if the log did not have the bit of `page`."""
        return Comparison(self.changed, self.logged - {page})


class GuestMemory:
    """Regions of memory with random content, a log for them, and a copy to compare with."""

    def __init__(
        self, regions: Sequence[Region], choose: random.Random, *, iotlb: bool = False
    ) -> None:
        """Make the memory.

        Args:
            regions: the regions by ascending page.
            choose: chooses the content, and the order of the pages behind the IOTLB.
            iotlb: whether bus addresses are I/O addresses.
        """
        self._regions = tuple(regions)
        self._memory = [
            np.frombuffer(mmap.mmap(-1, region.pages * PAGE_BYTES), dtype=np.uint8)
            for region in regions
        ]
        for memory in self._memory:
            memory[:] = np.frombuffer(choose.randbytes(len(memory)), dtype=np.uint8)
        self.pages = [page for region in regions for page in _pages(region)]
        shuffled = choose.sample(self.pages, len(self.pages)) if iotlb else self.pages
        self._guest_page = dict(
            zip((page + iotlb * _BUS_PAGE for page in self.pages), shuffled, strict=True)
        )
        self.iotlb = iotlb
        self.log = np.zeros((self.pages[-1] // 64 + 1) * 8 + _LOG_GUARD_BYTES, dtype=np.uint8)
        self._copy: list[NDArray[np.uint8]] = []

    def bus(self, page: int) -> int:
        """Return the bus address with the number `page`."""
        return (page + self.iotlb * _BUS_PAGE) * PAGE_BYTES

    def guest_pages(self, bus: int, length: int) -> frozenset[int]:
        """Return the guest pages of `length` bytes at a bus address."""
        last = (bus + length - 1) // PAGE_BYTES
        return frozenset(self._guest_page[page] for page in range(bus // PAGE_BYTES, last + 1))

    def write(self, bus: int, data: bytes) -> None:
        """Write to a bus address, as the driver."""
        done = 0
        for piece in self._pieces(bus, len(data)):
            piece[:] = np.frombuffer(data, dtype=np.uint8, count=len(piece), offset=done)
            done += len(piece)

    def read(self, bus: int, length: int) -> bytes:
        """Return `length` bytes at a bus address."""
        return b"".join(piece.tobytes() for piece in self._pieces(bus, length))

    def _pieces(self, bus: int, length: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the memory of `length` bytes at a bus address, page by page."""
        end = bus + length
        while bus < end:
            offset = bus % PAGE_BYTES
            size = min(PAGE_BYTES - offset, end - bus)
            yield self._page(self._guest_page[bus // PAGE_BYTES])[offset : offset + size]
            bus += size

    def _page(self, page: int) -> NDArray[np.uint8]:
        for region, memory in zip(self._regions, self._memory, strict=True):
            if page in _pages(region):
                start = (page - region.page) * PAGE_BYTES
                return memory[start : start + PAGE_BYTES]
        raise KeyError(page)

    def ring_address(self, bus: int) -> int:
        """Return the address for VHOST_SET_VRING_ADDR; without an IOTLB it is the process's."""
        return bus if self.iotlb else address_of(next(self._pieces(bus, 1)))

    def table(self) -> bytes:
        """Return the memory as struct vhost_memory."""
        rows = zip(self._regions, self._memory, strict=True)
        return MEMORY.pack(len(self._regions), 0) + b"".join(
            REGION.pack(region.page * PAGE_BYTES, len(memory), address_of(memory), 0)
            for region, memory in rows
        )

    def mappings(self) -> Iterator[tuple[int, int]]:
        """Yield the bus address of each page, and the process's address of the page."""
        for page, guest_page in self._guest_page.items():
            yield page * PAGE_BYTES, address_of(self._page(guest_page))

    def snapshot(self) -> None:
        """Clear the log, and keep a copy to compare with."""
        self.log[:] = 0
        self.copy()

    def copy(self) -> None:
        """Keep a copy to compare with."""
        self._copy = [memory.copy() for memory in self._memory]

    def compare(self) -> Comparison:
        """Compare the memory with the copy, page by page, and with the log."""
        changed = np.concatenate(
            [
                (copy != memory).reshape(-1, PAGE_BYTES).any(axis=1)
                for copy, memory in zip(self._copy, self._memory, strict=True)
            ]
        )
        logged = np.flatnonzero(np.unpackbits(self.log, bitorder="little"))
        return Comparison(
            frozenset(self.pages[number] for number in np.flatnonzero(changed)),
            frozenset(logged.tolist()),
        )


def _pages(region: Region) -> range:
    return range(region.page, region.page + region.pages)
