"""The values of the HTML report's drawings, computed from the report's JSON.

The templates ``timeline.html.j2`` and ``ram_map.html.j2`` draw them as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

Json = Mapping[str, Any]

_LEFT, _RIGHT = 64, 884
_LABEL_EVERY: Final = 26

_MAP_COLUMNS: Final = 64
_MAP_CELLS: Final = 2048


def timeline(migration: Json) -> dict[str, Any]:
    """Place the events of a precopy on the horizontal axis of a drawing.

    Args:
        migration: the member of that name in a proof's JSON.

    Returns:
        The values that ``timeline.html.j2`` draws. Horizontal places and widths are in the units of
        its SVG; amounts are in bytes or pages, with the largest of each.
    """
    history, harvests = migration["history"], migration["harvests"]
    ends_s = [harvest["began_s"] + harvest["duration_s"] for harvest in harvests]
    span_s: float = max(history[-1]["seconds"], *ends_s, 0.001)

    def x(seconds: float) -> float:
        return _LEFT + max(0.0, min(1.0, seconds / span_s)) * (_RIGHT - _LEFT)

    width = max(2.0, min(10.0, (_RIGHT - _LEFT) / max(1, len(harvests)) * 0.6))
    known = [sample for sample in history if sample["remaining"] is not None]
    stop_s = migration["moments_s"].get("STOP")
    return {
        "left": _LEFT,
        "right": _RIGHT,
        "remaining": [(x(sample["seconds"]), sample["remaining"]) for sample in known],
        "most_bytes": max((sample["remaining"] for sample in known), default=0) or 1,
        "syncs": _syncs(migration["passes"], x),
        "bars": [(min(x(each["began_s"]) - width / 2, _RIGHT - width), each) for each in harvests],
        "bar_width": width,
        "most_pages": max((harvest["pages"] for harvest in harvests), default=0) or 1,
        "stop": None if stop_s is None else x(stop_s),
        "ticks": [(x(tick), text) for tick, text in _ticks(span_s)],
    }


def _syncs(passes: Sequence[Json], x: Callable[[float], float]) -> list[tuple[float, bool, Json]]:
    """Return for each bitmap sync its place, whether it has a label, and its pass.

    No two labels overlap.
    """
    syncs = []
    last_label = -math.inf
    for precopy_pass in passes:
        place = x(precopy_pass["began_s"])
        is_labelled = place - last_label >= _LABEL_EVERY and place < _RIGHT - 12
        if precopy_pass["sync"]:
            last_label = place if is_labelled else last_label
            syncs.append((place, is_labelled, precopy_pass))
    return syncs


def _ticks(span_s: float) -> list[tuple[float, str]]:
    """Return the ticks of the axis, at most nine, in seconds, each with its label."""
    power = 10 ** math.floor(math.log10(span_s))
    steps = (power / 5, power / 2, power, power * 2)
    step = next(step for step in steps if span_s / step <= 8)
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [number * step for number in range(int(span_s / step) + 1)]
    return [(tick, f"{tick:.{digits}f}{' s' if tick == ticks[-1] else ''}") for tick in ticks]


def ram_drawing(ram_map: Json) -> dict[str, Any]:
    """Reduce a map of guest RAM to at most a few thousand cells.

    Args:
        ram_map: the member of that name in the JSON of a proof or a check.

    Returns:
        The values that ``ram_map.html.j2`` draws: how many pages a cell stands for, a power of two,
        and each area with its cells.
    """
    pages = sum(area["pages"] for area in ram_map["areas"])
    pages_a_cell = 1 << max(0, math.ceil(math.log2(max(1, pages / _MAP_CELLS))))
    return {
        "pages_a_cell": pages_a_cell,
        "columns": _MAP_COLUMNS,
        "areas": [_drawn_area(area, ram_map, pages_a_cell) for area in ram_map["areas"]],
    }


def _drawn_area(area: Json, ram_map: Json, pages_a_cell: int) -> dict[str, Any]:
    """Return an area with its cells by class.

    A cell has the last of the map's classes that one of its pages has.
    """
    names, page_bytes = [each["name"] for each in ram_map["classes"]], ram_map["page_bytes"]
    kinds = np.repeat(
        np.array([kind for kind, _ in area["runs"]], dtype=np.uint8),
        np.array([pages for _, pages in area["runs"]], dtype=np.int64),
    )
    cells = np.maximum.reduceat(kinds, np.arange(0, len(kinds), pages_a_cell))
    columns = min(_MAP_COLUMNS, len(cells))
    begin = area["offset"] if area["gpa"] is None else area["gpa"]
    rows = []
    for first in range(0, len(kinds), columns * pages_a_cell):
        inside = np.bincount(kinds[first : first + columns * pages_a_cell], minlength=len(names))
        counts = zip(names, inside.tolist(), strict=True)
        text = ", ".join(f"{count} {name}" for name, count in counts if count)
        rows.append((begin + first * page_bytes, text))
    return {
        **area,
        "columns": columns,
        "cells": {name: np.flatnonzero(cells == kind).tolist() for kind, name in enumerate(names)},
        "rows": rows,
    }
