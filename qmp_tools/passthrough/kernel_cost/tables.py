"""The measurement as Markdown tables, as in docs/kernel-cost.md, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dmaproof.bench.iterator import size_name

from .measure import Row
from .model import GUESTS, YARDSTICKS, Fit, Projection

Nanoseconds = Mapping[str, float]

_NAMES: Final = {
    "report": "VFIO's REPORT",
    "hwpt": "GET_DIRTY_BITMAP, entries of 4 KiB",
    "hwpt, huge entries": "GET_DIRTY_BITMAP, entries of 1 MiB",
    "type1": "type1's DIRTY_PAGES",
}


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def number(value: float) -> str:
    """Format `value` with three digits, and k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _patterns(rows: Iterable[Row]) -> list[str]:
    """Return the patterns of `rows`: 'none', shares of the pages in ascending order, the others."""

    def place(pattern: str) -> float:
        try:
            return float(pattern)
        except ValueError:
            return 0 if pattern == "none" else 2

    return sorted(dict.fromkeys(row.pattern for row in rows), key=place)


def time_range(milliseconds: tuple[float, float]) -> str:
    """Format a range of times, from the shortest to the longest, with units."""
    low, high = (
        f"{_two_digits(value / 1000)} s" if value >= 995 else f"{_two_digits(value)} ms"
        for value in milliseconds
    )
    return low if low == high else f"{low} – {high}"


def costs_table(fits: Iterable[Fit], nanoseconds: Nanoseconds) -> str:
    """Return the table of what each of the kernel's operations costs."""

    def lines() -> Iterable[Sequence[str]]:
        for fit in fits:
            for name, cost in fit.costs.items():
                times = [cost * nanoseconds[yardstick] for yardstick in YARDSTICKS[name]]
                time = " – ".join(dict.fromkeys(map(number, sorted(times))))
                yield _NAMES[fit.interface], name, number(cost), time

    return table(("interface", "operation", "instructions", "ns"), lines())


def rows_table(rows: Sequence[Row], interface: str, *, fresh: bool) -> str:
    """Return the table of one interface's instructions, by pattern and range."""
    shown = [row for row in rows if row.interface == interface and row.fresh == fresh]
    sizes = sorted({row.bytes for row in shown})
    by_place = {(row.pattern, row.bytes): number(row.instructions) for row in shown}
    patterns = _patterns(shown)
    return table(
        ("dirty", *map(size_name, sizes)),
        ([pattern, *(by_place.get((pattern, size), "") for size in sizes)] for pattern in patterns),
    )


def projection_table(projections: Sequence[Projection], nanoseconds: Nanoseconds) -> str:
    """Return the table of the projection; '~' marks values that the model calculated."""
    places = {(one.interface, one.pattern, one.guest_bytes): one for one in projections}

    def cell(interface: str, pattern: str, guest: int) -> str:
        found = places.get((interface, pattern, guest))
        if found is None:
            return ""
        mark = "~" if found.measured is None else ""
        return f"{mark}{number(found.instructions)}: {time_range(found.milliseconds(nanoseconds))}"

    return table(
        ("interface", "dirty", *map(size_name, GUESTS)),
        (
            [interface, pattern, *(cell(interface, pattern, guest) for guest in GUESTS)]
            for interface, pattern in dict.fromkeys(
                (one.interface, one.pattern) for one in projections
            )
        ),
    )


def to_text(
    rows: Sequence[Row],
    fits: Mapping[str, Fit],
    projections: Sequence[Projection],
    nanoseconds: Nanoseconds,
) -> str:
    """Return all tables."""
    parts = []
    for interface, fresh in dict.fromkeys((row.interface, row.fresh) for row in rows):
        bitmap = "fresh bitmap" if fresh else "present bitmap"
        parts += [f"{_NAMES[interface]}, {bitmap}", rows_table(rows, interface, fresh=fresh)]
    worst = ", ".join(f"{_NAMES[fit.interface]} {fit.worst:.1%}" for fit in fits.values())
    parts += [
        f"Cost of each operation (largest error of a row: {worst})",
        costs_table(fits.values(), nanoseconds),
        "Nanoseconds of an instruction",
        table(("yardstick", "ns"), ((name, f"{value:.2g}") for name, value in nanoseconds.items())),
        "Projection to guests, fresh bitmaps (~: calculated by the model)",
        projection_table(projections, nanoseconds),
    ]
    return "\n\n".join(parts)


def draw(pyplot: Any, rows: Sequence[Row], projections: Sequence[Projection], file: Path) -> None:
    """Draw instructions over the range, by interface; hollow points are calculated."""
    graphs = {
        "VFIO's REPORT (device log)": ("report",),
        "iommufd's GET_DIRTY_BITMAP (IOMMU)": ("hwpt", "hwpt, huge entries"),
        "type1's DIRTY_PAGES": ("type1",),
    }
    figure, axes = pyplot.subplots(1, len(graphs), figsize=(15, 5), sharey=True)
    for graph, (title, interfaces) in zip(axes, graphs.items(), strict=True):
        for interface in interfaces:
            shown = [row for row in rows if row.interface == interface and row.fresh == _fresh(row)]
            for pattern in _patterns(shown):
                _draw_line(graph, interface, pattern, shown, projections)
        graph.set_xscale("log", base=2)
        graph.set_yscale("log")
        ticks = [1 << shift for shift in range(26, 45, 3)]
        graph.set_xticks(ticks, [size_name(tick) for tick in ticks], rotation=30, fontsize=8)
        graph.set_title(title, fontsize=10)
        graph.grid(alpha=0.3)
        graph.legend(fontsize=7)
    axes[0].set_ylabel("instructions of a request")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _fresh(row: Row) -> bool:
    """Return whether fresh bitmaps are drawn for the row's interface: as in QEMU, if measured."""
    return not row.interface.startswith("hwpt")


def _draw_line(
    graph: Any,
    interface: str,
    pattern: str,
    rows: Sequence[Row],
    projections: Sequence[Projection],
) -> None:
    measured = {row.bytes: row.instructions for row in rows if row.pattern == pattern}
    names = {"hwpt": "hwpt, entries of 4 KiB", "hwpt, huge entries": "hwpt, entries of 2048 KiB"}
    calculated = {
        one.guest_bytes: one.instructions
        for one in projections
        if one.interface == names.get(interface, interface)
        and one.pattern == pattern
        and one.measured is None
    }
    entries = {"hwpt": ", entries of 4 KiB", "hwpt, huge entries": ", entries of 1 MiB"}
    label = pattern + entries.get(interface, "")
    (line,) = graph.plot(list(measured), list(measured.values()), "o-", markersize=4, label=label)
    if calculated:
        last = max(measured)
        places = [last, *calculated]
        values = [measured[last], *calculated.values()]
        colour = line.get_color()
        graph.plot(places, values, "o:", markersize=4, color=colour, markerfacecolor="none")
