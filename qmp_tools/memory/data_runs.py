"""Find runs of set flags, and the runs of data between the holes of a file.

SEEK_HOLE (lseek(2)) walks through all data up to the next hole. A file of some gigabytes without a
hole needs tens of milliseconds for that, so the end of a run is sought only once, even if the file
is read in many pieces.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES, div_ceil


def runs_of(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the runs of True, of shape (runs, 2): the first number and the one after the last."""
    return np.flatnonzero(np.diff(flags, prepend=False, append=False)).reshape(-1, 2)


class DataRuns:
    """The runs of data of the open file `fd`, which does not change meanwhile."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._start = self._end = 0
        """The last run that was found, in bytes."""

    def within(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) runs between two bytes of the file, in whole pages of 4 KiB.

        `begin` and `end` are multiples of 4 KiB. A page that is partly a hole counts as data.
        """
        while begin < end:
            if not self._start <= begin < self._end and not self._find(begin):
                return
            if self._start >= end:
                return
            begin = max(begin, self._start)
            yield begin, min(end, self._end)
            begin = self._end

    def _find(self, position: int) -> bool:
        """Find the first run that ends after byte `position`; return whether there is one."""
        try:
            data = os.lseek(self._fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        self._start = data // PAGE_BYTES * PAGE_BYTES
        hole = os.lseek(self._fd, data, os.SEEK_HOLE)
        self._end = div_ceil(hole, PAGE_BYTES) * PAGE_BYTES
        return True
