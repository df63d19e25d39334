"""Find both paused guests' RAM in the QEMU processes, and compare it page by page."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError
from dmaproof.evidence import Slot
from dmaproof.page_compare import Extent, differing_pages
from dmaproof.units import PAGE_BYTES

from ..qemu.machine import RAM_BACKEND
from ..qemu.qemu import Qemu
from .physical_map import MapRegion, parse_flat_view, parse_hva, shown_parts
from .process_memory import mappings_of, shared_memory

_COPIED_AT_ONCE: Final = 1 << 20
_MEMFD_NAME: Final = "/memfd:memory-backend-memfd"


@dataclass(frozen=True)
class RamFile:
    """The file behind a guest's RAM, open for reading; `length` in bytes.

    `backend` is the id of the memory backend. `page_bytes` is the size of the file's pages; see
    `process_memory.SharedMemory`.
    """

    fd: int
    length: int
    device: int
    inode: int
    backend: str = RAM_BACKEND
    page_bytes: int = mmap.PAGESIZE

    @property
    def pages(self) -> int:
        """The number of pages of the guest's RAM."""
        return self.length // PAGE_BYTES

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on."""
        return os.pread(self.fd, length, offset)


@contextlib.contextmanager
def ram_file(pid: int, name: str) -> Iterator[RamFile]:
    """Open the memfd with the guest's RAM of process `pid`, called `name` in messages.

    Raises:
        UntestableError: the process has not exactly one such memfd, or it cannot be opened.
    """
    try:
        found = [
            entry
            for entry in Path(f"/proc/{pid}/fd").iterdir()
            if _link_of(entry).startswith(_MEMFD_NAME)
        ]
        inodes = {entry.stat().st_ino: entry for entry in found}
        if len(inodes) != 1:
            raise UntestableError(
                f"expected {name} to have one memfd for its RAM, got {len(inodes)}"
            )
        fd = os.open(next(iter(inodes.values())), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UntestableError(f"cannot open the RAM of {name}: {error}") from error
    try:
        status = os.fstat(fd)
        yield RamFile(fd, status.st_size, status.st_dev, status.st_ino)
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def ram_files(qemu: Qemu) -> AsyncIterator[list[RamFile]]:
    """Open the files of `qemu`'s memory backends: its guest's RAM and the plugged DIMMs.

    The files are in the order of their guest-physical addresses.

    Raises:
        UntestableError: one of them was not found.
    """
    name, pid = qemu.name, qemu.pid
    regions = parse_flat_view(await qemu.monitor("info mtree -f"))
    places = {
        memdev["id"]: _place_of(memdev["id"], regions, name)
        for memdev in await qemu.qmp.execute("query-memdev")
    }
    mappings = mappings_of(pid, name)
    with contextlib.ExitStack() as stack:
        files = []
        for backend, gpa in sorted(places.items(), key=itemgetter(1)):
            hva = parse_hva(await qemu.monitor(f"gpa2hva {gpa:#x}"))
            memory = hva and stack.enter_context(shared_memory(pid, mappings, hva, PAGE_BYTES))
            if not memory:
                raise UntestableError(
                    f"{name} has no shared file for its memory backend {backend}; expected "
                    "memory that a device outside QEMU can map"
                )
            length = os.fstat(memory.fd).st_size
            files.append(
                RamFile(memory.fd, length, memory.device, memory.inode, backend, memory.page_bytes)
            )
        yield files


async def slots_of(qemu: Qemu, ram: RamFile) -> list[Slot]:
    """Return the slots of `ram` in the guest's physical map, as `qemu` reports them."""
    return [
        Slot(gpa, length, offset, ram.device, ram.inode)
        for gpa, offset, length in shown_parts(
            parse_flat_view(await qemu.monitor("info mtree -f")), ram.backend
        )
    ]


@contextlib.contextmanager
def copied(files: Iterable[RamFile]) -> Iterator[list[RamFile]]:
    """Copy `files` as they are now; the copies exist until the context ends.

    Raises:
        UntestableError: there is not enough memory for the copies.
    """
    with contextlib.ExitStack() as stack:
        copies = []
        for file in files:
            fd = os.memfd_create("dmaproof-ram", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            try:
                os.ftruncate(fd, file.length)
                for offset in range(0, file.length, _COPIED_AT_ONCE):
                    piece = file.read(offset, min(_COPIED_AT_ONCE, file.length - offset))
                    if piece.count(0) < len(piece):  # zeros stay a hole
                        os.pwrite(fd, piece, offset)
            except OSError as error:
                raise UntestableError(f"cannot copy the guest's RAM: {error}") from error
            copies.append(replace(file, fd=fd, page_bytes=mmap.PAGESIZE))
        yield copies


def _place_of(backend: str, regions: Sequence[MapRegion], name: str) -> int:
    for gpa, _, _ in shown_parts(regions, backend):
        return gpa
    raise UntestableError(
        f"{name} has no memory backend {backend} in its guest's physical map; expected it as RAM "
        "of the guest"
    )


def _link_of(entry: Path) -> str:
    try:
        return os.readlink(entry)  # noqa: PTH115  (a memfd's link names no path)
    except FileNotFoundError:
        return ""


def compare(source: RamFile, destination: RamFile) -> NDArray[np.int64]:
    """Return the sorted numbers of the pages that differ.

    Raises:
        UntestableError: the sizes differ.
    """
    if source.length != destination.length:
        raise UntestableError(
            f"the source has {source.length} bytes of RAM, but the destination has "
            f"{destination.length}; expected the same size"
        )
    if max(source.page_bytes, destination.page_bytes) > mmap.PAGESIZE:
        return _compare_copies(source, destination)
    return differing_pages(Extent(source.fd), Extent(destination.fd), source.length, PAGE_BYTES)


def _compare_copies(source: RamFile, destination: RamFile) -> NDArray[np.int64]:
    """Compare by read(2), which fills no hole and takes no huge page."""
    found = [np.empty(0, dtype=np.int64)]
    for offset in range(0, source.length, _COPIED_AT_ONCE):
        pieces = (
            np.frombuffer(ram.read(offset, _COPIED_AT_ONCE), dtype=np.uint64)
            for ram in (source, destination)
        )
        differs = np.not_equal(*pieces).reshape(-1, PAGE_BYTES // 8).any(axis=1)
        found.append(np.flatnonzero(differs) + offset // PAGE_BYTES)
    return np.concatenate(found)
