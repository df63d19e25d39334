"""A file that the peer shares with the server: RAM, the log, or the in-flight regions."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from support.hostile.layout import CANARY


class SharedFile:
    """A file shared with the server.

    `expected` is the content without the server's writes; `writable` marks the bytes that the
    server may write.
    """

    def __init__(self, name: str, size: int, offset: int = 0) -> None:
        self.fd = os.memfd_create(f"hostile-{name}", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.expected = np.full(size, CANARY, dtype=np.uint8)
        self.expected[offset:] = 0
        os.pwrite(self.fd, self.expected.tobytes(), 0)
        self.writable = np.zeros(size, dtype=bool)

    def write(self, offset: int, data: bytes) -> None:
        piece = data[: max(0, len(self.expected) - offset)]
        if piece:
            with contextlib.suppress(PermissionError):  # truncated and then sealed
                os.pwrite(self.fd, piece, offset)
                self.expected[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)

    def resize(self, size: int) -> None:
        """Resize the file; truncated bytes are zeros if the file grows again."""
        with contextlib.suppress(PermissionError):  # sealed
            os.ftruncate(self.fd, size)
            self.expected[size:] = 0

    def share(self, offset: int, length: int) -> None:
        self.writable[offset : offset + length] = True

    def content(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = os.pread(self.fd, len(self.expected), 0)
        return np.frombuffer(data.ljust(len(self.expected), b"\0"), np.uint8)

    def check(self, name: str) -> None:
        wrong = np.flatnonzero((self.content() != self.expected) & ~self.writable)
        assert not len(wrong), f"{name}: written outside the shared ranges, at {wrong[0]:#x}"
