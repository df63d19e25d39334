"""L1's clock beside the host's, so that a wait in L1 is as long as the caller says.

L1's clock counts the ticks of a timer, and may be too fast on a busy machine: one showed 866 s
where 302 had passed, and every wait ended too early. A folder that L1 makes in what it shares with
the host has the host's time.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

_SAMPLE_S: Final = 1.0


class Clocks:
    """Both clocks from now on; `shared` is a folder of the host's."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._begin = _now(shared)
        time.sleep(_SAMPLE_S)

    def in_l1(self, timeout_s: float) -> float:
        """`timeout_s` in seconds of L1's clock, as it has gone so far."""
        return stretched(timeout_s, self._begin, _now(self._shared))


class Moment(NamedTuple):
    """The same moment by both clocks, in seconds."""

    host: float
    l1: float


def stretched(timeout_s: float, begin: Moment, end: Moment) -> float:
    """`timeout_s` of the host's in seconds of L1's clock, but never less than as many."""
    passed_s = end.host - begin.host
    return timeout_s * max(1.0, (end.l1 - begin.l1) / passed_s) if passed_s > 0 else timeout_s


def _now(shared: Path) -> Moment:
    with tempfile.TemporaryDirectory(dir=shared) as fresh:
        return Moment(os.stat(fresh).st_mtime, time.monotonic())  # noqa: PTH116
