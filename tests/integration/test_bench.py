"""The strategies that a benchmark compiles and measures: they set exactly the reported bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof.bench import strategies
from dmaproof.bench.iterator import GIB, Row, measure
from dmaproof.bench.patterns import Locality, Pattern
from dmaproof.bench.strategies import Sample, Words
from support.command import Tool

BITMAP_PAGE = 4096
WINDOW_BITS = 512 * 8 * BITMAP_PAGE
"""The bits of one window of 512 bitmap pages."""

Carry = Callable[[Words, Words, Words], Sample]
STRATEGIES: list[Carry] = [strategies.copied, strategies.in_pieces, strategies.on_demand]


def words(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, dtype=np.uint64)


@pytest.mark.parametrize("carry", STRATEGIES)
def test_each_strategy_sets_the_reported_bits_and_no_others(carry: Carry) -> None:
    bitmap = np.zeros(1024 * BITMAP_PAGE, dtype=np.uint8)
    bitmap[0] = 0x80
    bits = words(0, 63, 127, 200, 4095, WINDOW_BITS - 1, 2 * WINDOW_BITS - 64)
    counts = words(1, 2, 1, 300, 40000, 2, 64)
    expected = np.unpackbits(bitmap, bitorder="little")
    for first, count in zip(bits.tolist(), counts.tolist(), strict=True):
        expected[first : first + count] = 1
    carry(bitmap, bits, counts)
    assert (np.unpackbits(bitmap, bitorder="little") == expected).all()


def test_each_strategy_has_its_known_cost() -> None:
    bitmap = np.zeros(1024 * BITMAP_PAGE, dtype=np.uint8)
    far_apart = words(0, WINDOW_BITS, 1), words(1, 1, 1)
    assert strategies.copied(bitmap, *far_apart)[2:] == (1024, 2 * bitmap.nbytes)
    # The third report lies outside the window that begins at the page of the second report.
    assert strategies.on_demand(bitmap, *far_apart)[2:] == (3 * 512, 0)
    assert strategies.in_pieces(bitmap, words(0, 1), words(1, 1))[2:] == (1024, 0)


@pytest.mark.parametrize("carry", STRATEGIES)
@pytest.mark.parametrize(
    ("bits", "counts"),
    [
        (words(8 * BITMAP_PAGE), words(1)),
        (words(8 * BITMAP_PAGE - 1), words(2)),
        (words(1), words(2**64 - 1)),
        (words(0), words(0)),
        (words(0), words(1, 1)),
        (np.zeros(1, dtype=np.uint32), words(1)),
    ],
)
def test_reports_that_do_not_fit_are_refused_and_nothing_is_set(
    carry: Carry, bits: Words, counts: Words
) -> None:
    bitmap = np.zeros(BITMAP_PAGE, dtype=np.uint8)
    with pytest.raises(ValueError, match="strategies: "):
        carry(bitmap, bits, counts)
    assert not bitmap.any()


def test_only_sorted_reports_can_be_carried_in_pieces() -> None:
    bitmap = np.zeros(BITMAP_PAGE, dtype=np.uint8)
    with pytest.raises(ValueError, match="a report is empty"):
        strategies.in_pieces(bitmap, words(9, 1), words(1, 1))


def test_a_pattern_is_measured_for_every_strategy() -> None:
    (row,) = measure([Pattern(GIB, 1e-4, Locality.SCATTERED)], repeats=1)
    assert isinstance(row, Row)
    assert all(cost.seconds > 0 for cost in row.costs.values())
    assert row.costs["copied"].bytes == 2 * GIB // 4096 // 8


def test_without_a_compiler_the_benchmark_names_the_package_to_install(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    outcome = tool.run("bench", "iterator", "--most", "1G")
    assert outcome.exit_code == 3
    assert "apt-get install gcc libc6-dev" in outcome.errors
