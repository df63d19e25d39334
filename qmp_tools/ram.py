"""Both guests' RAM: found in the QEMU processes, compared page by page while they are paused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent, differing_pages

PAGE_BYTES: Final = 4096
_MEMFD_NAME: Final = "/memfd:memory-backend-memfd"


@dataclass(frozen=True)
class RamFile:
    """The file behind a guest's RAM, open for reading; `length` in bytes."""

    fd: int
    length: int
    device: int
    inode: int

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
