"""The kinds of memory that a guest's RAM can be in: QEMU's memory backends.

Each side of a migration has a file of its own. A file in a folder has no name: QEMU creates it and
removes its name at once (file_ram_open in QEMU's system/physmem.c), so that no other QEMU uses it
and nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError
from dmaproof.units import div_ceil

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_FILE: Final = "file"
_OBJECTS: Final = {
    "memfd": "memory-backend-memfd",
    _FILE: "memory-backend-file",
    "ram": "memory-backend-ram",
    "hugetlb-2M": "memory-backend-memfd,hugetlb=on,hugetlbsize=2M",
    "hugetlb-1G": "memory-backend-memfd,hugetlb=on,hugetlbsize=1G",
}
_HUGE_PAGE_BYTES: Final = {"hugetlb-2M": 2 * _MIB, "hugetlb-1G": _GIB}
HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")
_MOUNTS: Final = Path("/proc/self/mountinfo")

KINDS: Final = tuple(_OBJECTS)
"""The kinds of memory backend; ``file`` may be followed by ':' and a folder."""


@dataclass(frozen=True)
class MemoryBackend:
    """A kind of memory backend; `folder` is that of ``file``.

    Two QEMUs have the same files if the files are `named`.
    """

    kind: str
    folder: str | None = None
    named: bool = False

    def object(self, name: str, size: int) -> str:
        """Return the value of QEMU's ``-object`` for a backend of `size` bytes with an id."""
        if self.folder is None:
            place = ""
        else:
            path = Path(self.folder, name if self.named else "")
            place = f",mem-path={str(path).replace(',', ',,')}"
        return f"{_OBJECTS[self.kind]},id={name},size={size},share=on{place}"

    @property
    def page_bytes(self) -> int:
        """The size of the memory's pages."""
        if self.folder is not None and _is_hugetlbfs(Path(self.folder)):
            return os.statvfs(self.folder).f_bsize  # hugetlbfs_statfs returns its page size
        return _HUGE_PAGE_BYTES.get(self.kind, mmap.PAGESIZE)

    def page_counters(self, huge_pages: Path = HUGE_PAGES) -> Path:
        """Return the folder in which the kernel counts the huge pages of this size."""
        return huge_pages / f"hugepages-{self.page_bytes // _KIB}kB"

    @property
    def has_huge_pages(self) -> bool:
        """Whether the memory's pages are larger than the host's own."""
        return self.page_bytes > mmap.PAGESIZE

    def __str__(self) -> str:
        """The text from which `parse_memory_backend` makes this backend."""
        return self.kind if self.folder is None else f"{self.kind}:{self.folder}"


MEMFD: Final = MemoryBackend("memfd")


def parse_memory_backend(text: str) -> MemoryBackend:
    """Parse the name of a kind, or 'file:FOLDER'; 'file' alone is in the folder of TMPDIR.

    Raises:
        UsageError: the kind is unknown, or the folder does not exist.
    """
    kind, separator, folder = text.partition(":")
    if kind not in KINDS or (separator and kind != _FILE):
        raise UsageError(
            f"--memory-backend: expected one of {', '.join(KINDS)}, or {_FILE}:FOLDER, got {text!r}"
        )
    if kind != _FILE:
        return MemoryBackend(kind)
    folder = folder or tempfile.gettempdir()
    if not Path(folder).is_dir():
        raise UsageError(
            f"--memory-backend {text}: {folder} is not a folder; give the folder in which QEMU is "
            "to create a file for each side"
        )
    return MemoryBackend(kind, folder)


def require_huge_pages(
    backend: MemoryBackend, side_bytes: int, *, huge_pages: Path = HUGE_PAGES
) -> None:
    """Check that this host has enough free huge pages, if the backend has any, for two sides.

    Args:
        backend: what each side's RAM is in.
        side_bytes: the RAM of one side.
        huge_pages: the folder in which the kernel reports on its huge pages.

    Raises:
        UntestableError: it has not; the message has the command that reserves them.
    """
    if not backend.has_huge_pages:
        return
    page_bytes = backend.page_bytes
    size = f"{page_bytes // _GIB}G" if page_bytes >= _GIB else f"{page_bytes // _MIB}M"
    folder = backend.page_counters(huge_pages)
    if not folder.is_dir():
        raise UntestableError(
            f"--memory-backend {backend}: this host has no huge pages of {size}; use another kind "
            "of memory"
        )
    needed = 2 * div_ceil(side_bytes, page_bytes)
    free = _number(folder, "free") - _number(folder, "resv")
    free += max(0, _number(folder, "nr_overcommit") - _number(folder, "surplus"))
    if free < needed:
        count = _number(folder, "nr") + needed - free
        raise UntestableError(
            f"--memory-backend {backend}: expected {needed} free huge pages of {size} for both "
            f"sides, got {free}; reserve them with: echo {count} | sudo tee "
            f"{folder / 'nr_hugepages'}"
        )


def require_space(backend: MemoryBackend, side_bytes: int) -> None:
    """Check that QEMU can create the files of two sides in the backend's folder, if it has one.

    The files are sparse. If a guest writes to a page and the file system is full, the kernel kills
    QEMU (SIGBUS).

    Args:
        backend: what each side's RAM is in.
        side_bytes: the RAM of one side.

    Raises:
        UsageError: no file can be created there.
        UntestableError: the file system has too little space.
    """
    folder = backend.folder
    if folder is None:
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            space = os.statvfs(folder)
    except OSError as error:
        raise UsageError(
            f"--memory-backend {backend}: no file can be created in {folder}: {error.strerror}; "
            "give another folder"
        ) from error
    free_bytes = space.f_bavail * space.f_frsize
    # A tmpfs or hugetlbfs without a limit has no blocks (shmem_statfs, hugetlbfs_statfs).
    if space.f_blocks and free_bytes < 2 * side_bytes:
        raise UntestableError(
            f"--memory-backend {backend}: expected {div_ceil(2 * side_bytes, _MIB)} MiB of free "
            f"space in {folder} for both sides, got {free_bytes // _MIB} MiB; free some space, or "
            "give another folder"
        )


def _number(folder: Path, name: str) -> int:
    """Return a number of huge pages (the kernel's Documentation/admin-guide/mm/hugetlbpage.rst)."""
    return int((folder / f"{name}_hugepages").read_text())


def _is_hugetlbfs(folder: Path) -> bool:
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTS.read_text().splitlines():  # proc_pid_mountinfo(5)
        words = line.split()
        if words[2] == number and words[words.index("-") + 1] == "hugetlbfs":
            return True
    return False
