"""How long a migration stopped its guest, what that time went to, and whether it is too long.

The downtime begins when the source's QEMU begins to stop the guest, and ends when the destination
has loaded everything. In a proof the destination stays paused then; the comparison of its RAM is no
part of the downtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LOADING: Final = "the destination loads what was sent last"
_SOURCE: Final = "the source; this QEMU's events do not report its parts"
_SOURCE_BY_EVENTS: Final = "the source from its STOP event on; QEMU does not report its downtime"


@dataclass(frozen=True)
class Part:
    """One part of the downtime."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Downtime:
    """The parts of a downtime, in their order; none where it could not be measured.

    `limit_s` is what ``--max-downtime`` allows, None for any.
    """

    parts: Sequence[Part] = ()
    limit_s: float | None = None

    @property
    def seconds(self) -> float | None:
        """All of it; None where it could not be measured."""
        return sum(part.seconds for part in self.parts) if self.parts else None

    @property
    def exceeded(self) -> bool:
        """Whether it is longer than the limit."""
        return self.limit_s is not None and self.seconds is not None and self.seconds > self.limit_s

    @property
    def unmeasured(self) -> bool:
        """Whether there is a limit, but nothing to hold against it."""
        return self.limit_s is not None and self.seconds is None

    @property
    def sentence(self) -> str:
        """How it compares with the limit."""
        if self.seconds is None:
            return (
                f"the downtime could not be measured and held against the {self.limit_s:g} s that "
                "--max-downtime allows: QEMU reports neither its downtime nor its events"
            )
        longest = max(self.parts, key=lambda part: part.seconds)
        relation = "longer than" if self.exceeded else "within"
        return (
            f"the downtime was {self.seconds:.3g} s, {relation} the {self.limit_s:g} s that "
            f"--max-downtime allows; its longest part, {longest.seconds:.3g} s: {longest.what}"
        )

    def to_json(self) -> dict[str, Any]:
        """The members by name."""
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
    """The downtime of a migration that has completed.

    `moments` are its source's (see `Migration`), `reported_s` is the downtime that QEMU reports;
    `loading_ns` is when the destination may have begun with what was sent last, and was done.
    """
    stopped, completed = moments.get("STOP"), moments.get("completed")
    parts = [
        Part(str(it["what"]), float(it["seconds"]))
        for it in downtime_parts(moments, harvests, reported_s or None)
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
    """What the source's downtime went to, in its order; empty where QEMU does not tell enough.

    QEMU counts its downtime from before it stops the vCPUs to the migration's completion, and stops
    its devices before it says STOP (vm_stop), so the device's last harvest comes before that.
    """
    stopped, completed = moments.get("STOP"), moments.get("completed")
    if stopped is None or completed is None or downtime_s is None:
        return []
    steps = [("QEMU stops the vCPUs and its devices, and waits for them", 0)]
    at = completed - int(downtime_s * 1e9)
    if len(harvests):
        last = harvests[-1]
        began, ended = int(last["time_ns"]), int(last["time_ns"] + last["duration_ns"])
        if at <= began and ended <= stopped:
            steps = [("QEMU stops the vCPUs, and tells the device to stop", 0)]
            steps += [("the device harvests a last time", began)]
            steps += [("QEMU takes the answer, and stops its other devices", ended)]
    steps += [("QEMU syncs its bitmap, and sends the last pages and the devices' state", stopped)]
    handed_over = moments.get("device")
    if handed_over is not None and stopped <= handed_over <= completed:
        steps[-1] = ("QEMU syncs its bitmap, and sends the last pages", stopped)
        steps += [("QEMU sends the devices' state", handed_over)]
    starts = [at, *(start for _, start in steps[1:])]
    return [
        {"what": what, "seconds": max(0, end - start) / 1e9}
        for (what, _), (start, end) in zip(steps, pairwise([*starts, completed]), strict=True)
    ]
