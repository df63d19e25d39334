"""The RAM half of QEMU's live migration: everything once, then what is dirty, again and again.

As in QEMU, a pass first *syncs*: it takes the bits of the dirty log by an atomic exchange, and adds
what its own vCPUs wrote. Then it sends those pages as they are at that moment. A page whose bit
comes only after the last sync is not sent again.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmaproof import _core
from dmaproof.dirty_log import LOG_PAGE_BYTES

PAGE_BYTES: Final = LOG_PAGE_BYTES


class Place(NamedTuple):
    """A run of guest RAM: where it is in the guest and in the RAM's file. All in bytes."""

    gpa: int
    length: int
    offset: int


class Precopy:
    """Carries the RAM in the file `source` over to the file `destination`, page by page.

    `logged_ns` tells of each page of the files when its bit was taken from the log last
    (CLOCK_MONOTONIC, 0: never); shape (pages,), dtype int64.
    """

    def __init__(self, source: int, destination: int, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._source = _pages(source)
        self._destination = _pages(destination)
        self._log: mmap.mmap | None = None
        self._dirty = np.zeros(len(self._source), dtype=np.bool_)
        self.logged_ns = np.zeros(len(self._source), dtype=np.int64)

    def set_log(self, fd: int) -> None:
        """Sync the log in the file `fd` from now on; the one before is synced once more.

        QEMU does so too (vhost_dev_log_resize): what came before the switch stands in the old one.
        """
        self._sync()
        self._log = mmap.mmap(fd, 0)

    def send_all(self) -> None:
        """The first pass: every page is sent, dirty or not."""
        self._sync()
        self._dirty[:] = True
        self._send()

    def cpu_wrote(self, gpa: int, length: int) -> None:
        """A vCPU wrote `length` bytes at `gpa`: QEMU's accelerator has noted that."""
        for place in self.places:
            low, high = max(gpa, place.gpa), min(gpa + length, place.gpa + place.length)
            if low < high:
                first = (low - place.gpa + place.offset) // PAGE_BYTES
                last = (high - 1 - place.gpa + place.offset) // PAGE_BYTES
                self._dirty[first : last + 1] = True

    def pass_on(self) -> None:
        """One pass: sync, and send what is dirty."""
        self._sync()
        self._send()

    def _sync(self) -> None:
        if self._log is None:
            return
        for gpa, length, offset in self.places:
            first, end = gpa // PAGE_BYTES, (gpa + length) // PAGE_BYTES
            now_ns = time.monotonic_ns()
            count = min(end, len(self._log) * 8) - first
            if count <= 0:
                continue
            runs = np.frombuffer(_core.take_set(self._log, first, count), dtype=np.uint64)
            for start, pages in runs.reshape(-1, 2).tolist():
                there = slice(offset // PAGE_BYTES + start, offset // PAGE_BYTES + start + pages)
                self._dirty[there] = True
                self.logged_ns[there] = now_ns

    def _send(self) -> None:
        pages = np.flatnonzero(self._dirty)
        self._dirty[pages] = False
        self._destination[pages] = self._source[pages]


def _pages(fd: int) -> NDArray[np.uint8]:
    """A RAM file's bytes, shape (pages, `PAGE_BYTES`)."""
    return np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8).reshape(-1, PAGE_BYTES)
