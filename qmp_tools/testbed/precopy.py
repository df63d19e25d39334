"""The RAM part of QEMU's live migration: send every page once, then repeatedly the dirty pages.

As in QEMU, a pass first *syncs*: it takes the bits of the dirty log by an atomic exchange, and adds
the pages that its own vCPUs wrote. Then it sends those pages as they are at that moment. A page
whose bit is set only after the last sync is not sent again.
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
    """A range of guest RAM, by its place in the guest and in the RAM's file. All in bytes."""

    gpa: int
    length: int
    offset: int


class Precopy:
    """A precopy of the RAM in the file `source` to the file `destination`, page by page.

    `logged_ns` holds for each page of the files when its bit was last taken from the log
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
        """Sync the log in the file `fd` from now on, after a last sync of the previous log.

        QEMU does the same (vhost_dev_log_resize), because bits that were set before the switch are
        in the previous log.
        """
        self._sync()
        self._log = mmap.mmap(fd, 0)

    def send_all(self) -> None:
        """Carry out the first pass, which sends every page, dirty or not."""
        self._sync()
        self._dirty[:] = True
        self._send()

    def cpu_wrote(self, gpa: int, length: int) -> None:
        """Mark `length` bytes at `gpa` dirty, as QEMU's accelerator does when a vCPU writes."""
        for place in self.places:
            low, high = max(gpa, place.gpa), min(gpa + length, place.gpa + place.length)
            if low < high:
                first = (low - place.gpa + place.offset) // PAGE_BYTES
                last = (high - 1 - place.gpa + place.offset) // PAGE_BYTES
                self._dirty[first : last + 1] = True

    def pass_on(self) -> None:
        """Carry out one pass: sync, and send the dirty pages."""
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
                run = slice(offset // PAGE_BYTES + start, offset // PAGE_BYTES + start + pages)
                self._dirty[run] = True
                self.logged_ns[run] = now_ns

    def _send(self) -> None:
        pages = np.flatnonzero(self._dirty)
        self._dirty[pages] = False
        self._destination[pages] = self._source[pages]


def _pages(fd: int) -> NDArray[np.uint8]:
    """Return the bytes of a RAM file, shape (pages, `PAGE_BYTES`)."""
    return np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8).reshape(-1, PAGE_BYTES)
