"""Measure the downtime of a migration and its parts, and compare it with the limit.

The downtime begins when the source's QEMU begins to stop the guest, and ends when the destination
has loaded everything. In a proof the destination then stays paused. The time for the comparison of
its RAM does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LOADING: Final = "the destination loads the data that was sent last"
_SOURCE: Final = "the source; this QEMU's events do not divide its downtime into parts"
_SOURCE_BY_EVENTS: Final = "the source from its STOP event on; QEMU does not report its downtime"


@dataclass(frozen=True)
class Part:
    """One part of the downtime."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Downtime:
    """The parts of a downtime, in order; empty if the downtime could not be measured.

    `limit_s` is the limit that ``--max-downtime`` sets; None without a limit.
    """

    parts: Sequence[Part] = ()
    limit_s: float | None = None

    @property
    def seconds(self) -> float | None:
        """The whole downtime; None if it could not be measured."""
        return sum(part.seconds for part in self.parts) if self.parts else None

    @property
    def exceeded(self) -> bool:
        """Whether the downtime is longer than the limit."""
        return self.limit_s is not None and self.seconds is not None and self.seconds > self.limit_s

    @property
    def unmeasured(self) -> bool:
        """Whether there is a limit, but no measured downtime to compare with it."""
        return self.limit_s is not None and self.seconds is None

    @property
    def sentence(self) -> str:
        """A sentence that compares the downtime with the limit."""
        if self.seconds is None:
            return (
                f"the downtime could not be measured and compared with the {self.limit_s:g} s "
                "that --max-downtime allows: QEMU reported neither a downtime nor migration events"
            )
        longest = max(self.parts, key=lambda part: part.seconds)
        relation = "longer than" if self.exceeded else "within"
        return (
            f"the downtime was {self.seconds:.3g} s, {relation} the {self.limit_s:g} s that "
            f"--max-downtime allows; the longest part took {longest.seconds:.3g} s: {longest.what}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the downtime as a JSON object."""
        return {
            "limit_s": self.limit_s,
            "seconds": self.seconds,
            "exceeded": self.exceeded,
            "parts": [asdict(part) for part in self.parts],
        }


def measure_downtime(
    moments: Mapping[str, int],
    harvests: NDArray[np.void],
    reported_s: float | None,
    loading_ns: tuple[int, int] | None,
    limit_s: float | None,
) -> Downtime:
    """Measure the downtime of a completed migration.

    Args:
        moments: the source's `Migration.moments`.
        harvests: the device's harvests, with their fields 'time_ns' and 'duration_ns'.
        reported_s: the downtime in QEMU's query-migrate.
        loading_ns: when the destination may have begun to load the last data, and when it had
            loaded everything (CLOCK_MONOTONIC).
        limit_s: the limit that ``--max-downtime`` sets.
    """
    stopped, completed = moments.get("STOP"), moments.get("completed")
    parts = [
        Part(str(part["what"]), float(part["seconds"]))
        for part in downtime_parts(moments, harvests, reported_s or None)
    ]
    if not parts and reported_s:
        parts = [Part(_SOURCE, reported_s)]
    if not parts and stopped is not None and completed is not None:
        parts = [Part(_SOURCE_BY_EVENTS, max(0, completed - stopped) / 1e9)]
    if parts and loading_ns is not None:
        began, ended = max(loading_ns[0], completed or 0), loading_ns[1]
        parts.append(Part(_LOADING, max(0, ended - began) / 1e9))
    return Downtime(parts, limit_s)


def downtime_parts(
    moments: Mapping[str, int], harvests: NDArray[np.void], downtime_s: float | None
) -> list[dict[str, float | str]]:
    """Return the parts of the source's downtime, in order; empty if QEMU reports too little.

    QEMU counts its downtime from before it stops the vCPUs to the migration's completion. QEMU
    stops its devices before it sends STOP (vm_stop), so the device's last harvest precedes STOP.
    """
    stopped, completed = moments.get("STOP"), moments.get("completed")
    if stopped is None or completed is None or downtime_s is None:
        return []
    steps = [("QEMU stops the vCPUs and its devices and waits for them", 0)]
    at = completed - int(downtime_s * 1e9)
    if len(harvests):
        last = harvests[-1]
        began, ended = int(last["time_ns"]), int(last["time_ns"] + last["duration_ns"])
        if at <= began and ended <= stopped:
            steps = [("QEMU stops the vCPUs and asks the device to stop", 0)]
            steps += [("the device harvests for the last time", began)]
            steps += [("QEMU receives the answer and stops its other devices", ended)]
    steps += [("QEMU syncs its bitmap and sends the last pages and the devices' state", stopped)]
    handed_over = moments.get("device")
    if handed_over is not None and stopped <= handed_over <= completed:
        steps[-1] = ("QEMU syncs its bitmap and sends the last pages", stopped)
        steps += [("QEMU sends the devices' state", handed_over)]
    starts = [at, *(start for _, start in steps[1:])]
    return [
        {"what": what, "seconds": max(0, end - start) / 1e9}
        for (what, _), (start, end) in zip(steps, pairwise([*starts, completed]), strict=True)
    ]
