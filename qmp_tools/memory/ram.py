"""Both guests' RAM: found in the QEMU processes, compared page by page while they are paused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, replace
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
from .physical_map import parse_flat_view, parse_hva, shown_parts
from .process_memory import mappings_of, shared_memory

_COPIED_AT_ONCE: Final = 1 << 20
_MEMFD_NAME: Final = "/memfd:memory-backend-memfd"


@dataclass(frozen=True)
class RamFile:
    """The file behind a guest's RAM, open for reading; `length` in bytes.

    `backend` is the id of the memory backend.
    """

    fd: int
    length: int
    device: int
    inode: int
    backend: str = RAM_BACKEND

    @property
    def pages(self) -> int:
        """How many pages the guest's RAM has."""
        return self.length // PAGE_BYTES

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        return os.pread(self.fd, length, offset)


@contextlib.contextmanager
def ram_file(pid: int, name: str) -> Iterator[RamFile]:
    """The memfd that process `pid`, called `name` in messages, has for its guest's RAM.

    Raises:
        UntestableError: there is not exactly one, or it may not be opened.
    """
    try:
        found = [
            entry
            for entry in Path(f"/proc/{pid}/fd").iterdir()
            if _link_of(entry).startswith(_MEMFD_NAME)
        ]
        inodes = {entry.stat().st_ino: entry for entry in found}
        if len(inodes) != 1:
            raise UntestableError(f"{name} has {len(inodes)} memfds for its RAM, not one")
        fd = os.open(next(iter(inodes.values())), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UntestableError(f"the RAM of {name} cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        yield RamFile(fd, status.st_size, status.st_dev, status.st_ino)
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def ram_files(qemu: Qemu) -> AsyncIterator[list[RamFile]]:
    """The memfds that `qemu` has for its guest's RAM and for the DIMMs that are plugged into it.

    Raises:
        UntestableError: one of them is not to be found.
    """
    name, pid = qemu.name, qemu.pid
    places = {RAM_BACKEND: 0}
    for device in await qemu.qmp.execute("query-memory-devices"):
        backend = str(device["data"]["memdev"]).removeprefix("/objects/")
        places[backend] = device["data"]["addr"]
    mappings = mappings_of(pid, name)
    with contextlib.ExitStack() as stack:
        files = []
        for backend, gpa in places.items():
            hva = parse_hva(await qemu.monitor(f"gpa2hva {gpa:#x}"))
            memory = hva and stack.enter_context(shared_memory(pid, mappings, hva, PAGE_BYTES))
            if not memory:
                raise UntestableError(f"{name} has no file for its memory backend {backend}")
            length = os.fstat(memory.fd).st_size
            files.append(RamFile(memory.fd, length, memory.device, memory.inode, backend))
        yield files


async def slots_of(qemu: Qemu, ram: RamFile) -> list[Slot]:
    """Where `ram` stands in the guest's physical map, as `qemu` itself reports it."""
    return [
        Slot(gpa, length, offset, ram.device, ram.inode)
        for gpa, offset, length in shown_parts(
            parse_flat_view(await qemu.monitor("info mtree -f")), ram.backend
        )
    ]


@contextlib.contextmanager
def copied(files: Iterable[RamFile]) -> Iterator[list[RamFile]]:
    """Copies of `files` as they are now, for as long as the context lasts.

    Raises:
        UntestableError: there is not enough memory for them.
    """
    with contextlib.ExitStack() as stack:
        copies = []
        for it in files:
            fd = os.memfd_create("dmaproof-ram", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            try:
                os.ftruncate(fd, it.length)
                for offset in range(0, it.length, _COPIED_AT_ONCE):
                    piece = it.read(offset, min(_COPIED_AT_ONCE, it.length - offset))
                    if piece.count(0) < len(piece):  # else it stays a hole
                        os.pwrite(fd, piece, offset)
            except OSError as error:
                raise UntestableError(f"the guest's RAM cannot be copied: {error}") from error
            copies.append(replace(it, fd=fd))
        yield copies


def _link_of(entry: Path) -> str:
    try:
        return os.readlink(entry)  # noqa: PTH115  (a memfd's link names no path)
    except FileNotFoundError:
        return ""


def compare(source: RamFile, destination: RamFile) -> NDArray[np.int64]:
    """The numbers of the pages that differ, sorted.

    Raises:
        UntestableError: the two are not of one size.
    """
    if source.length != destination.length:
        raise UntestableError(
            f"the source has {source.length} bytes of RAM, the destination {destination.length}"
        )
    return differing_pages(Extent(source.fd), Extent(destination.fd), source.length, PAGE_BYTES)
