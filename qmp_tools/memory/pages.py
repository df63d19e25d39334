"""The RAM of one guest page by page, in memory that can be read or in a snapshot.

Both kinds of pages answer the same questions: their digests, which of them are absent, and their
content. Pages that can be read on both sides are compared byte by byte, other pages by digest.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmaproof import page_compare
from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent
from dmaproof.units import PAGE_BYTES

from .absent_pages import Absent
from .copied_memory import ProcessMemory
from .data_runs import DataRuns
from .page_digests import page_digests
from .physical_map import MapRegion


class Pages(ABC):
    """`count` consecutive pages of 4 KiB."""

    count: int

    @abstractmethod
    def digests(self) -> NDArray[np.uint64]:
        """Return the digests, of shape (count, 2); see `page_digests`."""

    @abstractmethod
    def absent(self) -> Absent:
        """Find the absent pages."""

    @abstractmethod
    def content(self, page: int) -> bytes | None:
        """Return the bytes of one page; None if only its digest is known."""

    @abstractmethod
    def are_zero(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each of these pages contains only zeros."""


class ReadablePages(Pages):
    """Pages whose content can be read; `find_absent` finds the absent ones."""

    find_absent: Callable[[], Absent]

    def absent(self) -> Absent:
        """Find the absent pages."""
        return self.find_absent()

    @abstractmethod
    def extent(self) -> Extent:
        """Return the pages as an extent that can be mapped.

        Pages of the same guest may overwrite it.
        """

    @abstractmethod
    def content(self, page: int) -> bytes:
        """Read one page."""

    def are_zero(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Read each of these pages, and return whether it contains only zeros."""
        return np.array([not any(self.content(int(page))) for page in pages], dtype=np.bool_)


@dataclass(frozen=True)
class FilePages(ReadablePages):
    """Pages in a file, whose runs of data are `runs`."""

    place: Extent
    count: int
    runs: DataRuns
    find_absent: Callable[[], Absent]

    def digests(self) -> NDArray[np.uint64]:
        """Read and digest the pages that are not holes."""
        begin = self.place.offset
        runs = (
            (start - begin, end - begin)
            for start, end in self.runs.within(begin, begin + self.count * PAGE_BYTES)
        )
        return page_digests(self.count, runs, self._read_into)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            at = self.place.offset + offset + done
            count = os.preadv(self.place.fd, [buffer[done:]], at)
            if count == 0:
                raise UntestableError(f"a file with guest memory ends at byte {at}: it has shrunk")
            done += count

    def content(self, page: int) -> bytes:
        """Read one page."""
        return os.pread(self.place.fd, PAGE_BYTES, self.place.offset + page * PAGE_BYTES)

    def extent(self) -> Extent:
        """Return the place in the file."""
        return self.place


@dataclass(frozen=True)
class ProcessPages(ReadablePages):
    """Pages in the memory of a process from host address `hva` on."""

    memory: ProcessMemory
    hva: int
    count: int
    find_absent: Callable[[], Absent]

    def digests(self) -> NDArray[np.uint64]:
        """Read and digest the pages that have content."""
        runs = self.memory.data_runs(self.hva, self.count * PAGE_BYTES)
        return page_digests(self.count, runs, self._read_into)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        self.memory.read_into(self.hva + offset, buffer)

    def content(self, page: int) -> bytes:
        """Read one page."""
        content = bytearray(PAGE_BYTES)
        self._read_into(page * PAGE_BYTES, memoryview(content))
        return bytes(content)

    def extent(self) -> Extent:
        """Copy the pages."""
        return self.memory.copy(self.hva, self.count * PAGE_BYTES)


@dataclass(frozen=True)
class SavedPages(Pages):
    """Pages of a snapshot: their digests, the absent pages, and the content of some pages."""

    count: int
    saved_digests: NDArray[np.uint64]
    saved_absent: Absent
    saved_content: Callable[[int], bytes | None]

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests."""
        return self.saved_digests

    def absent(self) -> Absent:
        """Return the absent pages."""
        return self.saved_absent

    def content(self, page: int) -> bytes | None:
        """Return the bytes of one page; None if they were not saved."""
        return self.saved_content(page)

    def are_zero(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each of these pages contained only zeros."""
        return np.logical_not(self.saved_digests[pages].any(axis=1)).astype(np.bool_)


class FilePlace(NamedTuple):
    """Where a region begins in a file: the file's device and inode (stat(2)), offset in bytes."""

    device: int
    inode: int
    offset: int


class PagedRam(ABC):
    """The RAM of one paused guest.

    `regions` is the physical map, and `hvas` has the host addresses of its RAM. `backends` are
    QEMU's memory backends (id → bytes), `dimms` its memory devices (id → base address and bytes).
    `files` has the regions that are in a shared file of the host whose boot has the id `boot_id`.
    """

    regions: Sequence[MapRegion]
    hvas: Mapping[MapRegion, int]
    backends: Mapping[str, int]
    dimms: Mapping[str, tuple[int, int]]
    boot_id: str

    @property
    @abstractmethod
    def files(self) -> Mapping[MapRegion, FilePlace]:
        """The regions that are in a shared file, and read there without a copy."""

    @abstractmethod
    def pages(self, region: MapRegion, gpa: int, count: int) -> AbstractAsyncContextManager[Pages]:
        """Make `count` pages from `gpa` on, all of them in `region`.

        The pages of the next call may overwrite them.

        Raises:
            UntestableError: the memory cannot be read, or QEMU could not save it.
        """

    @abstractmethod
    async def hidden_pages(self, region: MapRegion, offset: int, count: int) -> Pages | None:
        """Make `count` pages from byte `offset` of the region's backend on.

        Returns:
            The pages, which need not be in the physical map; None if only QEMU can read them.

        Raises:
            UntestableError: the memory cannot be read.
        """

    @property
    def length(self) -> int:
        """The bytes of RAM in the physical map."""
        return sum(region.length for region in self.regions if region.is_ram)


def differing_pages(source: Pages, destination: Pages) -> NDArray[np.int64]:
    """Return the sorted numbers of the pages that differ. Both have the same `count`."""
    if isinstance(source, ReadablePages) and isinstance(destination, ReadablePages):
        extents = source.extent(), destination.extent()
        return page_compare.differing_pages(*extents, source.count * PAGE_BYTES, PAGE_BYTES)
    return np.flatnonzero((source.digests() != destination.digests()).any(axis=1))
