"""Find the shared file behind a host address of a QEMU process, which holds the guest's RAM.

A file that QEMU holds open is opened through /proc/PID/fd, which its owner may do. A file that QEMU
has only mapped (shared anonymous memory) is opened through /proc/PID/map_files, which only root may
do (proc(5)).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dmaproof.errors import UntestableError

from ..qemu.attachment import owner_name


class OutOfReachError(UntestableError):
    """This user may not read the memory of a process."""


@dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps; addresses and `offset` in bytes."""

    start: int
    end: int
    shared: bool
    offset: int
    inode: int
    path: str


def parse_maps(lines: Iterable[str]) -> list[Mapping]:
    """Parse the lines of /proc/PID/maps.

    Raises:
        UntestableError: a line does not have the format of proc(5).
    """
    mappings = []
    for line in lines:
        try:
            addresses, permissions, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            shared = permissions[3] == "s"
            mapping = Mapping(start, end, shared, int(offset, 16), int(inode), "".join(path))
        except (ValueError, IndexError):
            raise UntestableError(
                f"/proc/PID/maps has a line in an unknown format: {line!r}"
            ) from None
        mappings.append(mapping)
    return mappings


def mappings_of(pid: int, name: str) -> list[Mapping]:
    """Read the mappings of process `pid`, called `name` in messages.

    Raises:
        OutOfReachError: this user may not read them.
        UntestableError: the process does not exist.
    """
    try:
        with Path(f"/proc/{pid}/maps").open() as lines:
            return parse_maps(lines)
    except PermissionError:
        owner = owner_name(Path(f"/proc/{pid}").stat().st_uid)
        raise OutOfReachError(
            f"this user may not read the memory of {name} (process {pid}), which belongs to user "
            f"{owner}; run dmaproof as {'root' if owner == 'root' else f'{owner} or as root'}"
        ) from None
    except OSError as error:
        raise UntestableError(
            f"cannot read the mappings of {name} (process {pid}): {error}"
        ) from error


@dataclass(frozen=True)
class SharedMemory:
    """A file that is mapped shared, open for reading; `offset` belongs to the requested address.

    `page_bytes` is the size of its pages. A mapping of a file of huge pages consists of whole ones,
    and a read of a hole through the mapping fills a huge page.
    """

    fd: int
    offset: int
    device: int
    inode: int
    page_bytes: int = mmap.PAGESIZE


@contextlib.contextmanager
def shared_memory(
    pid: int, mappings: Iterable[Mapping], hva: int, length: int
) -> Iterator[SharedMemory | None]:
    """Open the file behind `length` bytes at `hva` in process `pid`.

    Yields:
        The file; None for private memory.
    """
    mapping = _shared_mapping(mappings, hva, length)
    fd = _open(pid, mapping) if mapping else None
    if mapping is None or fd is None:
        yield None
        return
    try:
        status = os.fstat(fd)
        yield SharedMemory(
            fd,
            mapping.offset + hva - mapping.start,
            status.st_dev,
            status.st_ino,
            max(mmap.PAGESIZE, os.fstatvfs(fd).f_bsize),  # hugetlbfs_statfs returns its page size
        )
    finally:
        os.close(fd)


def _shared_mapping(mappings: Iterable[Mapping], hva: int, length: int) -> Mapping | None:
    """Return the first of the adjacent mappings that hold `length` bytes from `hva` on."""
    first: Mapping | None = None
    end = hva
    for mapping in mappings:
        if not mapping.start <= end < mapping.end:
            continue
        if not mapping.shared:
            return None
        if first is None:
            first = mapping
        elif (mapping.inode, mapping.offset) != (first.inode, first.offset + end - first.start):
            return None
        end = mapping.end
        if end >= hva + length:
            return first
    return None


def _open(pid: int, mapping: Mapping) -> int | None:
    for entry in _entries(pid, mapping):
        with contextlib.suppress(OSError):
            return os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _entries(pid: int, mapping: Mapping) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if entry.stat().st_ino == mapping.inode and entry.readlink() == Path(mapping.path):
                    yield entry
    yield Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
