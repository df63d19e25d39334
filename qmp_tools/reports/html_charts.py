"""The drawings of the HTML report, as SVG made from the report's JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np

from ..qemu.machine import MIB

CLASS_STYLES: Final = {
    "other": "plain",
    "equal": "plain",
    "device": "soft",
    "late": "strong",
    "discarded": "soft",
    "known": "known",
    "undecided": "strong",
    "lost": "bad",
    "differs": "bad",
}
"""The style sheet's class for each class of `ram_map`."""

Axis = Callable[[float], float]
"""Where on the drawing a second stands."""

_WIDTH: Final = 900
_LEFT, _RIGHT = 64, 884
_REMAINING: Final = (26, 150)
_HARVESTS: Final = (190, 270)
_LABEL_EVERY: Final = 26

_MAP_COLUMNS: Final = 64
_MAP_CELLS: Final = 2048
_CELL: Final = 10


def timeline(migration: Mapping[str, Any]) -> str:
    """What remained to be sent, the bitmap syncs, and what each harvest brought, over time."""
    history, harvests = migration["history"], migration["harvests"]
    points = [(it["seconds"], it["remaining"]) for it in history if it["remaining"] is not None]
    ends = [history[-1]["seconds"], *(it["began_s"] + it["duration_s"] for it in harvests)]
    span_s: float = max(*ends, 0.001)

    def x(seconds: float) -> float:
        return _LEFT + max(0.0, min(1.0, seconds / span_s)) * (_RIGHT - _LEFT)

    parts = [
        *_remaining(points, x),
        *_syncs(migration["passes"], x),
        *_bars(harvests, x),
        *_stop(migration["moments_s"].get("STOP"), x),
        *_seconds_axis(span_s, x),
    ]
    return (
        f'<svg viewBox="0 0 {_WIDTH} 300" role="img" aria-label="The precopy over time">'
        + "".join(parts)
        + "</svg>"
    )


def _remaining(points: Sequence[tuple[float, int]], x: Axis) -> list[str]:
    top, bottom = _REMAINING
    most = max([amount for _, amount in points] or [0]) or 1
    path = "".join(
        f"L{x(seconds):.1f} {bottom - amount / most * (bottom - top):.1f}"
        for seconds, amount in points
    )
    area = (
        f'<path class="remaining" d="M{x(points[0][0]):.1f} {bottom}{path}'
        f'L{x(points[-1][0]):.1f} {bottom}Z"/>'
        if points
        else ""
    )
    return [
        f'<text class="ink" x="{_LEFT}" y="14">remaining to be sent</text>',
        area,
        f'<path class="axis" d="M{_LEFT} {top}V{bottom}H{_RIGHT}"/>',
        f'<text x="{_LEFT - 8}" y="{top + 8}" text-anchor="end">{most / MIB:.0f} MiB</text>',
        f'<text x="{_LEFT - 8}" y="{bottom}" text-anchor="end">0</text>',
    ]


def _syncs(passes: Sequence[Mapping[str, Any]], x: Axis) -> list[str]:
    parts = []
    labelled = -math.inf
    for it in passes:
        if not it["sync"]:
            continue
        at = x(it["began_s"])
        parts.append(
            f'<path class="sync" d="M{at:.1f} {_REMAINING[0]}V{_HARVESTS[1]}">'
            f"<title>bitmap sync {it['sync']}, {it['began_s']:.2f} s</title></path>"
        )
        if at - labelled >= _LABEL_EVERY and at < _RIGHT - 12:
            labelled = at
            parts.append(f'<text x="{at + 3:.1f}" y="{_REMAINING[1] + 14}">{it["sync"]}</text>')
    return [*parts, f'<text x="{_LEFT - 8}" y="{_REMAINING[1] + 14}" text-anchor="end">sync</text>']


def _bars(harvests: Sequence[Mapping[str, Any]], x: Axis) -> list[str]:
    top, bottom = _HARVESTS
    most = max([it["pages"] for it in harvests] or [0]) or 1
    width = max(2.0, min(10.0, (_RIGHT - _LEFT) / max(1, len(harvests)) * 0.6))
    parts = [
        f'<text class="ink" x="{_LEFT}" y="{top - 8}">pages of each harvest</text>',
        f'<path class="axis" d="M{_LEFT} {top}V{bottom}H{_RIGHT}"/>',
        f'<text x="{_LEFT - 8}" y="{top + 8}" text-anchor="end">{most}</text>',
        f'<text x="{_LEFT - 8}" y="{bottom}" text-anchor="end">0</text>',
    ]
    for it in harvests:
        at = min(x(it["began_s"]) - width / 2, _RIGHT - width)
        bars = "".join(
            f'<rect class="{style}" x="{at:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"/>'
            for style, height in (
                ("bad", it["pages"] / most * (bottom - top)),
                ("strong", it["merged_pages"] / most * (bottom - top)),
            )
        )
        parts.append(
            f"<g>{bars}<title>harvest {it['harvest']}, {it['began_s']:.2f} s: {it['pages']} pages "
            f"found, {it['merged_pages']} merged into the log</title></g>"
        )
    return parts


def _stop(seconds: float | None, x: Axis) -> list[str]:
    if seconds is None:
        return []
    at = x(seconds)
    return [
        f'<path class="stop" d="M{at:.1f} {_REMAINING[0] - 6}V{_HARVESTS[1]}"/>',
        f'<text x="{at - 4:.1f}" y="{_REMAINING[0] + 4}" text-anchor="end">the vCPUs stop</text>',
    ]


def _seconds_axis(span_s: float, x: Axis) -> list[str]:
    step = 10 ** math.floor(math.log10(span_s))
    step = next(it for it in (step / 5, step / 2, step, step * 2) if span_s / it <= 8)
    digits = max(0, -math.floor(math.log10(step)))
    ticks = [number * step for number in range(int(span_s / step) + 1)]
    return [
        f'<text x="{x(tick):.1f}" y="{_HARVESTS[1] + 18}" text-anchor="middle">'
        f"{tick:.{digits}f}{' s' if tick == ticks[-1] else ''}</text>"
        for tick in ticks
    ]


def cell_pages(ram_map: Mapping[str, Any]) -> int:
    """How many pages one cell of the map's drawing stands for: a power of two."""
    pages = sum(area["pages"] for area in ram_map["areas"])
    return 1 << max(0, math.ceil(math.log2(max(1, pages / _MAP_CELLS))))


def ram_area(area: Mapping[str, Any], ram_map: Mapping[str, Any], pages_a_cell: int) -> str:
    """One area of guest RAM; a cell shows the last of the map's classes that is in it."""
    kinds = np.repeat(
        np.array([kind for kind, _ in area["runs"]], dtype=np.uint8),
        np.array([pages for _, pages in area["runs"]], dtype=np.int64),
    )
    cells = np.maximum.reduceat(kinds, np.arange(0, len(kinds), pages_a_cell))
    columns = min(_MAP_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    size = _CELL - 1
    paths = []
    for number, kind in enumerate(ram_map["classes"]):
        squares = "".join(
            f"M{cell % columns * _CELL} {cell // columns * _CELL}h{size}v{size}h-{size}z"
            for cell in np.flatnonzero(cells == number).tolist()
        )
        if squares:
            paths.append(f'<path class="{CLASS_STYLES[kind["name"]]}" d="{squares}"/>')
    titles = "".join(
        _row_title(area, ram_map, kinds, row, row * columns * pages_a_cell, columns * pages_a_cell)
        for row in range(rows)
    )
    # Short areas keep the size of a cell: the drawing is as wide as its share of a full row.
    return (
        f'<svg viewBox="0 0 {columns * _CELL} {rows * _CELL}" '
        f'style="width:{columns / _MAP_COLUMNS * 100:.2f}%" role="img" '
        f'aria-label="{escape(area["region"])}">{"".join(paths)}{titles}</svg>'
    )


def _row_title(
    area: Mapping[str, Any],
    ram_map: Mapping[str, Any],
    kinds: Any,
    row: int,
    first: int,
    pages: int,
) -> str:
    inside = np.bincount(kinds[first : first + pages], minlength=len(ram_map["classes"]))
    base = (area["offset"] if area["gpa"] is None else area["gpa"]) + first * ram_map["page_bytes"]
    counts = ", ".join(
        f"{count} {kind['name']}"
        for kind, count in zip(ram_map["classes"], inside.tolist(), strict=True)
        if count
    )
    return (
        f'<rect class="none" pointer-events="all" x="0" y="{row * _CELL}" width="100%" '
        f'height="{_CELL}"><title>from {base:#x}: {counts} pages</title></rect>'
    )
