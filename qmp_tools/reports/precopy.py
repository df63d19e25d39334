"""The passes and the harvests of a proof's migration, for the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..migration.migration import Progress


def harvest_list(harvests: NDArray[np.void], began_ns: int) -> list[dict[str, Any]]:
    """Return the members of each harvest; times in seconds from `began_ns` (CLOCK_MONOTONIC)."""
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
    """Return the precopy's passes, each from one bitmap sync to the next, as seen by polling.

    `harvests` are the result of `harvest_list`. Passes that ended between two polls are merged into
    the last one of them.
    """
    began_ns = history[0].time_ns
    answer = []
    sent_before = 0
    groups = [list(group) for _, group in groupby(history, key=lambda progress: progress.syncs)]
    for number, group in enumerate(groups):
        first, last = group[0], group[-1]
        start_s = (first.time_ns - began_ns) / 1e9
        following = groups[number + 1][0] if number + 1 < len(groups) else None
        end_s = ((following or last).time_ns - began_ns) / 1e9
        sent = (following or last).transferred or sent_before
        # The first pass includes harvests before polling began, and the last one those after it.
        within = [
            harvest
            for harvest in harvests
            if (number == 0 or harvest["began_s"] >= start_s)
            and (following is None or harvest["began_s"] < end_s)
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
