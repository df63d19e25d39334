"""QEMU's vhost dirty log: where the chain hands its pages to QEMU.

The log has one bit for each 4 KiB page of guest-physical addresses, from GPA 0. It lies in shared
memory that QEMU sends with VHOST_USER_SET_LOG_BASE (vhost-user specification, "Migration"). At each
bitmap sync QEMU takes every word by an atomic exchange with 0, and several devices of one QEMU
write to one log. So a device sets bits with an atomic OR, and only after the data is in RAM.

`DirtyLog` is the protocol, and `VhostDirtyLog` is QEMU's log. `BufferDirtyLog` keeps its bits in
plain memory, for tests and for trackers without QEMU.
"""

from __future__ import annotations

import os
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._mapping import SharedMapping
from .errors import BitmapError, ProtocolError
from .units import PAGE_BYTES, div_ceil

LOG_PAGE_BYTES: Final = PAGE_BYTES
"""The bytes of a page that one bit of the log stands for (VHOST_LOG_PAGE), on every machine."""

Words = NDArray[np.uint64]


def log_bytes_needed(end_gpa: int) -> int:
    """Return the bytes (whole 64-bit words) of a log that covers the GPAs below `end_gpa`."""
    pages = div_ceil(end_gpa, LOG_PAGE_BYTES)
    return div_ceil(pages, 64) * 8


class DirtyLog(Protocol):
    """A log that receives dirty pages by GPA."""

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        """Set the log's bit for each dirty page of [gpa, gpa + pages * 4096).

        Bits are only set, never cleared.

        Args:
            gpa: the guest-physical address of the first page, page-aligned.
            words: a bitmap of uint64, least significant bit first.
            first_bit: the bit of `words` that stands for the page at `gpa`.
            pages: the number of pages.

        Raises:
            BitmapError: the pages reach beyond the log's end; no bit was set.
        """

    def close(self) -> None:
        """Release the log's memory."""


class BufferDirtyLog:
    """A dirty log in a buffer of the caller.

    Args:
        buffer: little-endian 64-bit words, with one bit for each 4 KiB page from GPA 0 on.

    Example:
        >>> import numpy as np
        >>> log = BufferDirtyLog(bytearray(8))
        >>> log.merge(0x3000, np.array([0b101], dtype=np.uint64), first_bit=0, pages=3)
        >>> bin(log.memory[0])
        '0b101000'
    """

    def __init__(self, buffer: bytearray | memoryview) -> None:
        self.memory = memoryview(buffer).cast("B")
        """A view of the log's bytes."""

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        """Set the log's bit for each dirty page, as `DirtyLog.merge`."""
        first_page, misplaced = divmod(gpa, LOG_PAGE_BYTES)
        if misplaced or first_page + pages > len(self.memory) * 8:
            raise BitmapError(
                f"dirty log: {pages} pages at GPA {gpa:#x} are misaligned or reach beyond the "
                f"log's end ({len(self.memory) * 8 * LOG_PAGE_BYTES:#x})"
            )
        _core.or_bits(self.memory, first_page, words, first_bit, pages)

    def close(self) -> None:
        """Release the buffer."""
        self.memory.release()


class VhostDirtyLog(BufferDirtyLog):
    """The log that QEMU sends with VHOST_USER_SET_LOG_BASE.

    `size` and `offset` are in bytes. The file descriptor may be closed afterwards.

    Raises:
        BitmapError: the size or the offset is not a multiple of 8, or the file is shorter than
            offset + size or cannot be mapped.
    """

    def __init__(self, fd: int, size: int, offset: int) -> None:
        available = os.fstat(fd).st_size
        if size == 0 or size % 8 or offset % 8 or offset + size > available:
            raise BitmapError(
                f"dirty log of {size:#x} bytes at offset {offset:#x}: expected whole 64-bit words "
                f"inside its file of {available:#x} bytes"
            )
        try:
            self._mapping = SharedMapping(fd, size, offset)
        except OSError as error:
            raise BitmapError(f"the dirty log's file cannot be mapped: {error}") from error
        super().__init__(memoryview(self._mapping))

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        """Merge as `BufferDirtyLog` does, then check that the log's file is still whole.

        Raises:
            ProtocolError: the log's file was truncated while it was mapped, and bits were lost.
        """
        super().merge(gpa, words, first_bit, pages)
        if self._mapping.lost:
            raise ProtocolError("dirty log: its file was truncated while it was in use")
