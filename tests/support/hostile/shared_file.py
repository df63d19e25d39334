"""A file that the peer shares with the server: RAM, the log, or what is in flight."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from support.hostile.layout import CANARY


class SharedFile:
    """A file shared with the server; `mine` is what it holds but for what the server wrote."""

    def __init__(self, name: str, size: int, offset: int = 0) -> None:
        self.fd = os.memfd_create(f"hostile-{name}", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.mine = np.full(size, CANARY, dtype=np.uint8)
        self.mine[offset:] = 0
        os.pwrite(self.fd, self.mine.tobytes(), 0)
        self.given = np.zeros(size, dtype=bool)

    def write(self, offset: int, data: bytes) -> None:
        piece = data[: max(0, len(self.mine) - offset)]
        if piece:
            with contextlib.suppress(PermissionError):  # cut short and then sealed
                os.pwrite(self.fd, piece, offset)
                self.mine[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)

    def resize(self, size: int) -> None:
        """What is cut away comes back as zeros, if the file ever grows again."""
        with contextlib.suppress(PermissionError):  # sealed
            os.ftruncate(self.fd, size)
            self.mine[size:] = 0

    def give(self, offset: int, length: int) -> None:
        self.given[offset : offset + length] = True

    def content(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = os.pread(self.fd, len(self.mine), 0)
        return np.frombuffer(data.ljust(len(self.mine), b"\0"), np.uint8)

    def check(self, name: str) -> None:
        wrong = np.flatnonzero((self.content() != self.mine) & ~self.given)
        assert not len(wrong), f"{name}: written outside what was given, at {wrong[0]:#x}"
