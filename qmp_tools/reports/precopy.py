"""What happened in a proof's migration, pass by pass and through the downtime, for the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..migration.migration import Progress


def harvest_list(harvests: NDArray[np.void], began_ns: int) -> list[dict[str, Any]]:
    """Each harvest; times in seconds from `began_ns` (CLOCK_MONOTONIC)."""
    return [
        {
            "harvest": int(harvest["epoch"]),
            "began_s": (int(harvest["time_ns"]) - began_ns) / 1e9,
            "duration_s": int(harvest["duration_ns"]) / 1e9,
            "pages": int(harvest["pages"]),
            "merged_pages": int(harvest["merged"]),
        }
        for harvest in harvests
    ]


def passes(
    history: Sequence[Progress], harvests: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The precopy's passes, each from one bitmap sync to the next, as far as polling saw them.

    `harvests` as `harvest_list` makes them. Of passes that were over between two polls only the
    last is there; its figures are those of all of them.
    """
    began_ns = history[0].time_ns
    answer = []
    sent_before = 0
    groups = [list(group) for _, group in groupby(history, key=lambda progress: progress.syncs)]
    for number, group in enumerate(groups):
        first, last = group[0], group[-1]
        start_s = (first.time_ns - began_ns) / 1e9
        behind = groups[number + 1][0] if number + 1 < len(groups) else None
        end_s = ((behind or last).time_ns - began_ns) / 1e9
        sent = (behind or last).transferred or sent_before
        # The first pass has what was harvested before polling began, the last what came after.
        within = [
            harvest
            for harvest in harvests
            if (number == 0 or harvest["began_s"] >= start_s)
            and (behind is None or harvest["began_s"] < end_s)
        ]
        answer.append(
            {
                "sync": first.syncs,
                "began_s": start_s,
                "ended_s": end_s,
                "harvests": len(within),
                "harvested_pages": sum(harvest["pages"] for harvest in within),
                "merged_pages": sum(harvest["merged_pages"] for harvest in within),
                "sent_bytes": sent - sent_before,
                "remaining_bytes": last.remaining,
            }
        )
        sent_before = sent
    return answer


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
    steps = [("QEMU stops the vCPUs, and tells the device to stop", 0)]
    at = completed - int(downtime_s * 1e9)
    if len(harvests):
        last = harvests[-1]
        began, ended = int(last["time_ns"]), int(last["time_ns"] + last["duration_ns"])
        if at <= began and ended <= stopped:
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
