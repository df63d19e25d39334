"""Copy memory that only QEMU's process has mapped, one piece at a time.

Private memory and huge pages are read through /proc/PID/mem at their host address. Opening that
file needs the same permission as attaching with ptrace (ptrace(2), PTRACE_MODE_ATTACH_FSCREDS):
CAP_SYS_PTRACE, or the user and group of a dumpable process. After ``-runas``, QEMU is not dumpable.
The copies pass through one memfd for each QEMU, so their size does not depend on the guest's RAM.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent

from .process_memory import Mapping

PIECE_BYTES: Final = 64 << 20
"""The size of one copy, and of the memory that the copies of one QEMU need."""


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of one process, called `name` in messages."""

    name: str
    mappings: Sequence[Mapping]
    _memory: int
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
        copy = memoryview(self._copy)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._memory, [copy[done:length]], hva + done)
            except OSError as error:
                raise UntestableError(
                    f"cannot read the memory of {self.name} at host address {hva + done:#x}: "
                    f"{error.strerror}"
                ) from error
            if count == 0:  # mem_rw: the process has ended
                raise UntestableError(f"{self.name} ended while dmaproof read its memory")
            done += count
        return Extent(self._copy_fd)


@contextlib.contextmanager
def process_memory(
    pid: int, name: str, mappings: Sequence[Mapping]
) -> Iterator[ProcessMemory | None]:
    """Open the memory of process `pid`; yield None if this user may not read it."""
    with contextlib.ExitStack() as stack:
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        stack.callback(os.close, memory)
        copy_fd = os.memfd_create("dmaproof-copy", os.MFD_CLOEXEC)
        stack.callback(os.close, copy_fd)
        os.ftruncate(copy_fd, PIECE_BYTES)
        # The copy stays mapped: faulting it in again for each piece takes three times as long.
        copy = stack.enter_context(mmap.mmap(copy_fd, PIECE_BYTES))
        yield ProcessMemory(name, mappings, memory, copy_fd, copy)
