"""The model that is fitted to the measurement, and its projection to larger guests.

`measure` counts the kernel's operations for a request: windows and pages pinned, ranges set, words
filled, entries of a page table visited. The model assumes that each operation always costs the same
number of instructions, and finds that number by least squares over the relative errors of all rows.
The projection adds these costs, so its error is that of the fit, which is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dmaproof.units import PAGE_BYTES

from .measure import DENSITIES, TIB, Comb, Pinned, Row, combs, pinned

Costs = Mapping[str, float]
"""Instructions by operation."""

GUESTS: Final = (TIB, 4 * TIB, 16 * TIB)
ENTRY_BYTES: Final = (PAGE_BYTES, 2 << 20)
"""The sizes of an IOMMU's page table entries: small pages and huge ones."""

YARDSTICKS: Final[Mapping[str, Sequence[str]]] = {
    "request": ("system call",),
    "window pinned": ("bitmap page found",),
    "bitmap page pinned": ("bitmap page found",),
    "bitmap page pinned after a missing one": ("bitmap page found",),
    "bitmap page faulted in": ("bitmap page faulted in",),
    "range set": ("bit set nearby", "bit set far away"),
    "entry visited": ("bit set nearby", "bit set far away"),
    "dirty entry": ("bit set nearby", "bit set far away"),
    "word filled": ("word filled",),
    "word copied": ("word filled",),
}
"""The yardstick of each operation; two, if its speed may lie anywhere between them."""


def _work(row: Row) -> dict[str, float]:
    """Return the number of each operation that the kernel does for `row`."""
    if row.interface == "report":
        return {
            "request": 1,
            "window pinned": row.pinned.windows,
            "bitmap page pinned": row.pinned.pages,
            "bitmap page faulted in": row.pinned.faults,
            "bitmap page pinned after a missing one": row.pinned.after_missing,
            "range set": row.sets,
            "word filled": row.filled,
        }
    if row.interface == "type1":
        return {
            "request": 1,
            "bitmap page faulted in": row.pinned.faults,
            "word copied": row.filled,
        }
    return {"request": 1, "entry visited": row.entries, "dirty entry": row.sets}


@dataclass(frozen=True)
class Fit:
    """The `costs` of an interface, and the largest relative error of a row."""

    interface: str
    costs: Costs
    rows: int
    worst: float

    def parts(self, row: Row) -> Costs:
        """Return the instructions of `row` by operation."""
        return {name: self.costs[name] * times for name, times in _work(row).items()}


def fit(rows: Sequence[Row]) -> Fit:
    """Return the costs that fit `rows` of one interface best, none of them negative."""
    names = list(_work(rows[0]))
    measured = np.array([row.instructions for row in rows], dtype=float)
    work = np.array([list(_work(row).values()) for row in rows], dtype=float)
    used = list(range(len(names)))
    while True:
        weighted = work[:, used] / measured[:, None]
        found = np.linalg.lstsq(weighted, np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            break
        used = [column for column, cost in zip(used, found, strict=True) if cost >= 0]
    costs = dict.fromkeys(names, 0.0)
    costs.update({names[column]: float(cost) for column, cost in zip(used, found, strict=True)})
    errors = np.abs(work @ np.array(list(costs.values())) / measured - 1)
    return Fit(rows[0].interface, costs, len(rows), float(errors.max()))


def fits(rows: Iterable[Row]) -> dict[str, Fit]:
    """Return a fit for each interface."""
    by_interface: dict[str, list[Row]] = {}
    for row in rows:
        by_interface.setdefault(row.interface, []).append(row)
    return {name: fit(of_interface) for name, of_interface in by_interface.items()}


@dataclass(frozen=True)
class Projection:
    """The cost of a request for a whole guest, with a fresh bitmap.

    `parts` has the instructions by operation. `measured` has the instructions of the row for the
    same request, or None if there is no such row.
    """

    interface: str
    guest_bytes: int
    pattern: str
    parts: Costs
    measured: int | None

    @property
    def instructions(self) -> float:
        """The measured instructions if there are any, else the model's."""
        return sum(self.parts.values()) if self.measured is None else self.measured

    def milliseconds(self, nanoseconds: Mapping[str, float]) -> tuple[float, float]:
        """Return the shortest and the longest time, by the `nanoseconds` of an instruction."""
        scale = self.instructions / sum(self.parts.values()) / 1e6

        def total(choose: Callable[[Iterable[float]], float]) -> float:
            return scale * sum(
                cost * choose(nanoseconds[yardstick] for yardstick in YARDSTICKS[name])
                for name, cost in self.parts.items()
            )

        return total(min), total(max)


def project(rows: Sequence[Row], found: Mapping[str, Fit]) -> Iterator[Projection]:
    """Project guests of 1, 4 and 16 TiB, for each interface and pattern of dirty pages."""
    for guest in GUESTS:
        for comb in combs(guest):
            words = guest // PAGE_BYTES // 64 if comb.pattern == "contiguous" else 0
            pins = pinned(guest, comb, fresh=True)
            row = Row("report", guest, comb.pattern, True, comb.count, pins, words, 0, 0)
            yield _project(rows, found["report"], row)
    for entry_bytes in ENTRY_BYTES:
        for guest in GUESTS:
            for density in (0.0, *DENSITIES):
                yield _page_table(found, guest, entry_bytes, density)
    for guest in GUESTS:
        words = guest // PAGE_BYTES // 64
        pins = Pinned(0, 0, words * 8 // PAGE_BYTES, 0)
        yield _project(
            rows, found["type1"], Row("type1", guest, "none", True, 0, pins, words, 0, 0)
        )


def _project(rows: Sequence[Row], model: Fit, like: Row) -> Projection:
    wanted = (like.interface, like.bytes, like.pattern, like.fresh)
    measured = [
        row.instructions
        for row in rows
        if (row.interface, row.bytes, row.pattern, row.fresh) == wanted
    ]
    return Projection(
        like.interface,
        like.bytes,
        like.pattern,
        model.parts(like),
        measured[0] if measured else None,
    )


def _page_table(
    found: Mapping[str, Fit], guest: int, entry_bytes: int, density: float
) -> Projection:
    """Project GET_DIRTY_BITMAP: the page table walk by its own fit, the bitmap by REPORT's fit.

    The bitmap is larger than any in the measurement of GET_DIRTY_BITMAP. The measured entries are
    of 4 KiB and 1 MiB; the projection assumes that an entry of 2 MiB costs as much as one of 1 MiB.
    """
    walk = found["hwpt" if entry_bytes == PAGE_BYTES else "hwpt, huge entries"]
    entries = guest // entry_bytes
    dirty = int(entries * density)
    stride = guest // dirty // entry_bytes * entry_bytes if dirty else 0
    pins = pinned(guest, Comb("", 0, entry_bytes, dirty, stride), fresh=True)
    bitmap = found["report"].parts(Row("report", guest, "", True, 0, pins, 0, 0, 0))
    parts = walk.parts(Row(walk.interface, guest, "", True, dirty, pins, 0, entries, 0))
    return Projection(
        f"hwpt, entries of {entry_bytes // 1024} KiB",
        guest,
        f"{density:g}" if density else "none",
        {**bitmap, **parts},
        None,
    )


def nanoseconds(timed: Mapping[str, float], counted: Mapping[str, float]) -> dict[str, float]:
    """Return the nanoseconds of an instruction, by yardstick: `timed` here, `counted` in L1."""
    return {name: timed[name] / counted[name] for name in timed}
