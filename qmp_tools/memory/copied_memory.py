"""Read or copy memory that only QEMU's process has mapped.

Private memory and huge pages are read through /proc/PID/mem at their host address. Opening that
file needs the same permission as attaching with ptrace (ptrace(2), PTRACE_MODE_ATTACH_FSCREDS):
CAP_SYS_PTRACE, or the user and group of a dumpable process. After ``-runas``, QEMU is not dumpable.
The copies pass through one memfd for each QEMU, so their size does not depend on the guest's RAM.

Anonymous memory that was never written reads as zeros. The kernel reports which pages have content
(/proc/PID/pagemap; Documentation/admin-guide/mm/pagemap.rst), so that the others need not be read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent
from dmaproof.units import PAGE_BYTES

from .absent_pages import PRESENT, SWAPPED, pagemap_entries
from .data_runs import runs_of
from .process_memory import Mapping

PIECE_BYTES: Final = 64 << 20
"""The size of one copy, and of the memory that the copies of one QEMU need."""


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of one process, called `name` in messages."""

    name: str
    mappings: Sequence[Mapping]
    _memory: int
    _pagemap: int
    _copy_fd: int
    _copy: mmap.mmap

    def has(self, hva: int, length: int) -> bool:
        """Return whether all of `length` bytes from `hva` on are mapped.

        Several adjacent mappings may hold them: a memory policy splits the mapping of a backend.
        """
        end = hva
        for mapping in self.mappings:
            if mapping.start <= end < mapping.end:
                end = mapping.end
                if end >= hva + length:
                    return True
        return False

    def copy(self, hva: int, length: int) -> Extent:
        """Copy `length` bytes, at most `PIECE_BYTES`, from `hva` on.

        Returns:
            The copy, which the next call overwrites.

        Raises:
            UntestableError: the memory cannot be read, or there is not enough memory for the copy.
        """
        # A view that is not released would keep `_copy` from being closed after an error.
        with memoryview(self._copy) as whole, whole[:length] as part:
            self.read_into(hva, part)
        return Extent(self._copy_fd)

    def read_into(self, hva: int, buffer: memoryview) -> None:
        """Read as many bytes as `buffer` has, from `hva` on.

        Raises:
            UntestableError: the memory cannot be read.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._memory, [buffer[done:]], hva + done)
            except OSError as error:
                raise UntestableError(
                    f"cannot read the memory of {self.name} at host address {hva + done:#x}: "
                    f"{error.strerror}"
                ) from error
            if count == 0:  # mem_rw: the process has ended
                raise UntestableError(f"{self.name} ended while dmaproof read its memory")
            done += count

    def data_runs(self, hva: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) runs of `length` bytes from `hva` on that may not be zeros.

        Both are counted from `hva` on. `hva` and `length` are multiples of 4 KiB, as are the runs.
        """
        for mapping in self.mappings:
            begin, end = max(mapping.start, hva), min(mapping.end, hva + length)
            if begin >= end:
                continue
            if mapping.inode:  # an absent page of a private file has the file's content
                yield begin - hva, end - hva
                continue
            for first, last in self._populated(begin, (end - begin) // PAGE_BYTES):
                yield begin - hva + first * PAGE_BYTES, begin - hva + last * PAGE_BYTES

    def _populated(self, hva: int, pages: int) -> list[tuple[int, int]]:
        """Return the runs of pages from `hva` on that are in memory or swapped out."""
        entries = pagemap_entries(self._pagemap, hva, pages)
        if entries is None:
            return [(0, pages)]
        flags = entries & (PRESENT | SWAPPED) != 0
        return [(int(first), int(last)) for first, last in runs_of(flags)]


@contextlib.contextmanager
def process_memory(
    pid: int, name: str, mappings: Sequence[Mapping]
) -> Iterator[ProcessMemory | None]:
    """Open the memory of process `pid`; yield None if this user may not read it."""
    with contextlib.ExitStack() as stack:
        try:
            memory, pagemap = (
                stack.enter_context(Path(f"/proc/{pid}/{file}").open("rb", buffering=0)).fileno()
                for file in ("mem", "pagemap")
            )
        except OSError:
            yield None
            return
        copy_fd = os.memfd_create("dmaproof-copy", os.MFD_CLOEXEC)
        stack.callback(os.close, copy_fd)
        os.ftruncate(copy_fd, PIECE_BYTES)
        # The copy stays mapped: faulting it in again for each piece takes three times as long.
        copy = stack.enter_context(mmap.mmap(copy_fd, PIECE_BYTES))
        yield ProcessMemory(name, mappings, memory, pagemap, copy_fd, copy)
