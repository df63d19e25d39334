"""The calculations of the measurement of the kernel's cost, outside L1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dmaproof.units import PAGE_BYTES, div_ceil
from qmp_tools.passthrough.kernel_cost import model, tables
from qmp_tools.passthrough.kernel_cost.measure import (
    GIB,
    MIB,
    PAGE_BITS,
    TIB,
    WINDOW_PAGES,
    Comb,
    Pinned,
    Row,
    combs,
    pinned,
)
from qmp_tools.passthrough.kernel_cost.yardsticks import yardsticks

NOTHING = Pinned(0, 0, 0, 0)
DOCS = Path(__file__).parents[2] / "docs" / "kernel-cost.md"


def pinned_by_the_kernel(size: int, comb: Comb) -> Pinned:
    """Return what iova_bitmap_set() pins for each range in turn, on a fresh bitmap."""
    total = size // PAGE_BYTES
    start = end = 0  # of the window, in bits; nothing is pinned yet
    windows = pages = faults = after_missing = 0
    present: set[int] = set()
    for number in range(comb.count):
        bit = (comb.offset + number * comb.stride) // PAGE_BYTES
        last = bit + comb.length // PAGE_BYTES
        while bit < last:
            if not (start <= bit and last <= end):
                start = bit // 8 * 8
                first = bit // PAGE_BITS
                missing = False
                pinned_pages = range(first, min(first + WINDOW_PAGES, div_ceil(total, PAGE_BITS)))
                for page in pinned_pages:
                    faults += page not in present
                    after_missing += missing and page in present
                    missing |= page not in present
                    present.add(page)
                windows += 1
                pages += len(pinned_pages)
                end = min(total, pinned_pages.stop * PAGE_BITS)
            bit = min(last, end)
    return Pinned(windows, pages, faults, after_missing)


@pytest.mark.parametrize("size", [64 * MIB, GIB, 65 * GIB, 256 * GIB, 4 * TIB])
def test_the_pinned_pages_are_those_of_the_kernels_algorithm(size: int) -> None:
    tried = [comb for comb in combs(size) if comb.count < 50_000]
    assert len(tried) >= 4
    for comb in tried:
        assert pinned(size, comb, fresh=True) == pinned_by_the_kernel(size, comb), comb
        present = pinned(size, comb, fresh=False)
        assert (present.faults, present.after_missing) == (0, 0)
        assert present.pages == pinned(size, comb, fresh=True).pages


def test_a_pattern_stays_inside_the_guest() -> None:
    for size in (64 * MIB, GIB, TIB):
        for comb in combs(size):
            ends = (comb.offset, comb.offset + max(0, comb.count - 1) * comb.stride)
            assert all(end >= 0 and end + comb.length <= size for end in ends), comb


COSTS = {
    "request": 12_000,
    "window pinned": 600,
    "bitmap page pinned": 240,
    "bitmap page faulted in": 2_200,
    "bitmap page pinned after a missing one": 230,
    "range set": 137,
    "word filled": 5,
}


def rows(costs: dict[str, int]) -> Sequence[Row]:
    """Return rows as if measured where each operation costs what `costs` says."""
    made = []
    for size in (GIB, 64 * GIB, TIB):
        for comb in combs(size):
            for fresh in (False, True):
                pins = pinned(size, comb, fresh=fresh)
                words = size // PAGE_BYTES // 64 if comb.pattern == "contiguous" else 0
                instructions = (
                    costs["request"]
                    + costs["window pinned"] * pins.windows
                    + costs["bitmap page pinned"] * pins.pages
                    + costs["bitmap page faulted in"] * pins.faults
                    + costs["bitmap page pinned after a missing one"] * pins.after_missing
                    + costs["range set"] * comb.count
                    + costs["word filled"] * words
                )
                made.append(
                    Row(
                        "report",
                        size,
                        comb.pattern,
                        fresh,
                        comb.count,
                        pins,
                        words,
                        0,
                        instructions,
                    )
                )
    for entries in (1000, 30_000):
        for dirty in (0, 500):
            for interface in ("hwpt", "hwpt, huge entries"):
                cost = 7000 + 70 * entries + 170 * dirty
                made.append(
                    Row(interface, entries * 4096, "", False, dirty, NOTHING, 0, entries, cost)
                )
    for words in (1 << 10, 1 << 16):
        for faults in (0, words // 512):
            pins = Pinned(0, 0, faults, 0)
            cost = 7000 + 7 * words + 2200 * faults
            made.append(
                Row("type1", words * 64 * 4096, "none", bool(faults), 0, pins, words, 0, cost)
            )
    return made


def test_the_fit_finds_the_cost_of_each_operation() -> None:
    found = model.fits(rows(COSTS))
    assert found["report"].worst < 0.001
    assert found["report"].costs == pytest.approx(COSTS, rel=0.01)
    assert found["hwpt"].costs == pytest.approx(
        {"request": 7000, "entry visited": 70, "dirty entry": 170}, rel=0.01
    )


def test_the_fit_reports_its_worst_error() -> None:
    made = list(rows(COSTS))
    odd = next(row for row in made if row.interface == "report" and row.pattern == "1")
    made[made.index(odd)] = Row(**{**vars(odd), "instructions": odd.instructions * 2})
    assert model.fits(made)["report"].worst > 0.2


def test_costs_are_never_negative() -> None:
    cheaper = {**COSTS, "window pinned": 0, "bitmap page pinned after a missing one": 0}
    assert all(cost >= 0 for cost in model.fits(rows(cheaper))["report"].costs.values())


def test_projections_use_a_measured_row_or_else_add_up_the_costs() -> None:
    made = rows(COSTS)
    found = model.fits(made)
    projections = {
        (one.interface, one.guest_bytes, one.pattern): one for one in model.project(made, found)
    }
    known = projections["report", TIB, "0.0001"]
    assert known.measured is not None
    assert known.instructions == pytest.approx(sum(known.parts.values()), rel=0.01)
    calculated = projections["report", 16 * TIB, "1"]
    assert calculated.measured is None
    assert calculated.instructions == pytest.approx(16 * TIB / 4096 * 137, rel=0.01)
    walk = projections["hwpt, entries of 4 KiB", TIB, "none"]
    assert walk.instructions == pytest.approx(TIB / 4096 * 70, rel=0.01)
    assert projections["hwpt, entries of 2048 KiB", TIB, "none"].instructions < walk.instructions


def test_times_lie_between_those_of_the_two_yardsticks() -> None:
    parts = {"request": 1e6, "range set": 1e6}
    nanoseconds = {"system call": 1.0, "bit set nearby": 0.1, "bit set far away": 0.5}
    projected = model.Projection("report", TIB, "1", parts, None)
    assert projected.milliseconds(nanoseconds) == pytest.approx((1.1, 1.5))
    twice = model.Projection("report", TIB, "1", parts, 4_000_000)
    assert twice.milliseconds(nanoseconds) == pytest.approx((2.2, 3.0))


def test_every_cost_has_a_yardstick_that_is_measured() -> None:
    measured = yardsticks()
    assert all(time > 0 for time in measured.values())
    named = {name for names in model.YARDSTICKS.values() for name in names}
    assert named == set(measured)
    for fit in model.fits(rows(COSTS)).values():
        assert set(fit.costs) <= set(model.YARDSTICKS)


def test_numbers_and_times_have_few_digits() -> None:
    assert [tables.number(value) for value in (0, 12, 1234, 56_789_000, 2.5e12)] == [
        *("0", "12", "1.23k", "56.8M", "2.5T")
    ]
    assert tables.time_range((1.0, 1.0)) == "1 ms"
    assert tables.time_range((12.34, 2500.0)) == "12 ms – 2.5 s"
    assert tables.time_range((184.0, 996.0)) == "180 ms – 1 s"


def test_tables_mark_calculated_values_and_the_docs_have_their_columns() -> None:
    made = rows(COSTS)
    found = model.fits(made)
    projections = list(model.project(made, found))
    nanoseconds = dict.fromkeys(yardsticks(), 0.3)
    text = tables.to_text(made, found, projections, nanoseconds)
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| report | 1 |"))
    measured, *calculated = row.split("|")[3:6]
    assert "~" not in measured
    assert all("~" in value for value in calculated)
    heads = {line for line in lines if line.startswith(("| interface", "| yardstick"))}
    assert len(heads) == 3
    page = DOCS.read_text()
    assert [head for head in heads if head not in page] == []
