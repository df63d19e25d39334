"""The measurement as text (Markdown, as docs/kernel-cost.md has it) and as a picture."""

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
    """A Markdown table; all but the first column to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def number(value: float) -> str:
    """Three digits, and k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _patterns(rows: Iterable[Row]) -> list[str]:
    """The patterns of `rows`: shares of the pages in their order, between 'none' and the others."""

    def place(pattern: str) -> float:
        try:
            return float(pattern)
        except ValueError:
            return 0 if pattern == "none" else 2

    return sorted(dict.fromkeys(row.pattern for row in rows), key=place)


def time_range(milliseconds: tuple[float, float]) -> str:
    """From the least to the most, with a unit."""
    low, high = (
        f"{_two_digits(value / 1000)} s" if value >= 995 else f"{_two_digits(value)} ms"
        for value in milliseconds
    )
    return low if low == high else f"{low} – {high}"


def costs_table(fits: Iterable[Fit], nanoseconds: Nanoseconds) -> str:
    """What each thing that the kernel does costs."""

    def lines() -> Iterable[Sequence[str]]:
        for fit in fits:
            for name, cost in fit.costs.items():
                times = [cost * nanoseconds[yardstick] for yardstick in YARDSTICKS[name]]
                told = " – ".join(dict.fromkeys(map(number, sorted(times))))
                yield _NAMES[fit.interface], name, number(cost), told

    return table(("interface", "each", "instructions", "ns"), lines())


def rows_table(rows: Sequence[Row], interface: str, *, fresh: bool) -> str:
    """Instructions of one interface's questions, by range and pattern."""
    shown = [row for row in rows if row.interface == interface and row.fresh == fresh]
    sizes = sorted({row.bytes for row in shown})
    by_place = {(row.pattern, row.bytes): number(row.instructions) for row in shown}
    patterns = _patterns(shown)
    return table(
        ("dirty", *map(size_name, sizes)),
        ([pattern, *(by_place.get((pattern, it), "") for it in sizes)] for pattern in patterns),
    )


def projection_table(projections: Sequence[Projection], nanoseconds: Nanoseconds) -> str:
    """Guests by interface and pattern; '~' where the model says it."""
    places = {(it.interface, it.pattern, it.guest_bytes): it for it in projections}

    def cell(interface: str, pattern: str, guest: int) -> str:
        found = places.get((interface, pattern, guest))
        if found is None:
            return ""
        sure = "~" if found.measured is None else ""
        return f"{sure}{number(found.instructions)}: {time_range(found.milliseconds(nanoseconds))}"

    return table(
        ("interface", "dirty", *map(size_name, GUESTS)),
        (
            [interface, pattern, *(cell(interface, pattern, guest) for guest in GUESTS)]
            for interface, pattern in dict.fromkeys(
                (it.interface, it.pattern) for it in projections
            )
        ),
    )


def to_text(
    rows: Sequence[Row],
    fits: Mapping[str, Fit],
    projections: Sequence[Projection],
    nanoseconds: Nanoseconds,
) -> str:
    """All tables."""
    parts = []
    for interface, fresh in dict.fromkeys((row.interface, row.fresh) for row in rows):
        bitmap = "a fresh bitmap" if fresh else "a bitmap that is there"
        parts += [f"{_NAMES[interface]}, {bitmap}", rows_table(rows, interface, fresh=fresh)]
    worst = ", ".join(f"{_NAMES[it.interface]} {it.worst:.1%}" for it in fits.values())
    parts += [
        f"Each costs (largest error of a row: {worst})",
        costs_table(fits.values(), nanoseconds),
        "Nanoseconds an instruction",
        table(("yardstick", "ns"), ((name, f"{it:.2g}") for name, it in nanoseconds.items())),
        "Guests (~: reckoned by the model), fresh bitmaps",
        projection_table(projections, nanoseconds),
    ]
    return "\n\n".join(parts)


def draw(pyplot: Any, rows: Sequence[Row], projections: Sequence[Projection], file: Path) -> None:
    """Instructions over the range, a graph for each way to ask; reckoned ones are hollow."""
    graphs = {
        "VFIO's REPORT (device log)": ("report",),
        "iommufd's GET_DIRTY_BITMAP (IOMMU)": ("hwpt", "hwpt, huge entries"),
        "type1's DIRTY_PAGES": ("type1",),
    }
    figure, axes = pyplot.subplots(1, len(graphs), figsize=(15, 5), sharey=True)
    for graph, (title, interfaces) in zip(axes, graphs.items(), strict=True):
        for interface in interfaces:
            shown = [it for it in rows if it.interface == interface and it.fresh == _fresh(it)]
            for pattern in _patterns(shown):
                _draw_line(graph, interface, pattern, shown, projections)
        graph.set_xscale("log", base=2)
        graph.set_yscale("log")
        ticks = [1 << shift for shift in range(26, 45, 3)]
        graph.set_xticks(ticks, [size_name(it) for it in ticks], rotation=30, fontsize=8)
        graph.set_title(title, fontsize=10)
        graph.grid(alpha=0.3)
        graph.legend(fontsize=7)
    axes[0].set_ylabel("instructions a question")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _fresh(row: Row) -> bool:
    """Which of the two bitmaps is drawn: as QEMU has it, where it was measured."""
    return not row.interface.startswith("hwpt")


def _draw_line(
    graph: Any,
    interface: str,
    pattern: str,
    rows: Sequence[Row],
    projections: Sequence[Projection],
) -> None:
    measured = {it.bytes: it.instructions for it in rows if it.pattern == pattern}
    names = {"hwpt": "hwpt, entries of 4 KiB", "hwpt, huge entries": "hwpt, entries of 2048 KiB"}
    reckoned = {
        it.guest_bytes: it.instructions
        for it in projections
        if it.interface == names.get(interface, interface)
        and it.pattern == pattern
        and it.measured is None
    }
    entries = {"hwpt": ", entries of 4 KiB", "hwpt, huge entries": ", entries of 1 MiB"}
    label = pattern + entries.get(interface, "")
    (line,) = graph.plot(list(measured), list(measured.values()), "o-", markersize=4, label=label)
    if reckoned:
        last = max(measured)
        places = [last, *reckoned]
        values = [measured[last], *reckoned.values()]
        colour = line.get_color()
        graph.plot(places, values, "o:", markersize=4, color=colour, markerfacecolor="none")
