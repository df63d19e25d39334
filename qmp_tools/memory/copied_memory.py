"""Memory that only QEMU's process has mapped, copied from there a piece at a time.

Private memory and huge pages are read through /proc/PID/mem at their host address. Opening that
takes what attaching with ptrace takes (ptrace(2), PTRACE_MODE_ATTACH_FSCREDS): CAP_SYS_PTRACE, or
the user and group of a process that is dumpable, which QEMU's ``-runas`` ends. The copies pass
through one memfd for each QEMU, so they need the same room however much RAM a guest has.
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
"""So much is copied at a time, and so much room the copies of one QEMU need."""


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of one process. `name` is what messages call it."""

    name: str
    mappings: Sequence[Mapping]
    _memory: int
    _copy_fd: int
    _copy: mmap.mmap

    def has(self, hva: int, length: int) -> bool:
        """Whether all of `length` bytes from `hva` on are mapped.

        Several mappings may have them, one behind the other: a memory policy splits a backend's.
        """
        end = hva
        for mapping in self.mappings:
            if mapping.start <= end < mapping.end:
                end = mapping.end
                if end >= hva + length:
                    return True
        return False

    def copy(self, hva: int, length: int) -> Extent:
        """A copy of `length` bytes, at most `PIECE_BYTES`, from `hva` on.

        The next copy overwrites it.

        Raises:
            UntestableError: the memory cannot be read, or there is no room for the copy.
        """
        copy = memoryview(self._copy)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._memory, [copy[done:length]], hva + done)
            except OSError as error:
                raise UntestableError(
                    f"the memory of {self.name} cannot be read at host address {hva + done:#x}: "
                    f"{error.strerror}"
                ) from error
            if count == 0:  # mem_rw: the process has ended
                raise UntestableError(f"{self.name} went away while its memory was read")
            done += count
        return Extent(self._copy_fd)


@contextlib.contextmanager
def process_memory(
    pid: int, name: str, mappings: Sequence[Mapping]
) -> Iterator[ProcessMemory | None]:
    """The memory of process `pid`; None where this user may not read it."""
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
        # It stays mapped: to fault a piece in anew for each copy takes three times as long.
        copy = stack.enter_context(mmap.mmap(copy_fd, PIECE_BYTES))
        yield ProcessMemory(name, mappings, memory, copy_fd, copy)
