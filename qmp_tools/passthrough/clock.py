"""Timeouts in L1 corrected by the host's clock, so that a wait lasts as long as the caller asked.

L1's clock counts the ticks of a timer, and may run too fast on a busy host: one L1 counted 866 s
while 302 s passed, and every wait ended too early. L1 reads the host's time from the time stamp of
a folder that it creates in the shared file system.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

_SAMPLE_S: Final = 1.0


class Clocks:
    """The host's clock and L1's, compared from now on; `shared` is a folder of the host."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._begin = _now(shared)
        time.sleep(_SAMPLE_S)

    def in_l1(self, timeout_s: float) -> float:
        """Return the seconds of L1's clock that last `timeout_s` at the rate measured so far."""
        return stretch(timeout_s, self._begin, _now(self._shared))


class Moment(NamedTuple):
    """One moment, in seconds of both clocks."""

    host: float
    l1: float


def stretch(timeout_s: float, begin: Moment, end: Moment) -> float:
    """Convert `timeout_s` from the host's clock to L1's; never return less than `timeout_s`."""
    passed_s = end.host - begin.host
    return timeout_s * max(1.0, (end.l1 - begin.l1) / passed_s) if passed_s > 0 else timeout_s


def _now(shared: Path) -> Moment:
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        return Moment(os.stat(folder).st_mtime, time.monotonic())  # noqa: PTH116
