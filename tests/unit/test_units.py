"""Division that rounds up, and SplitMix64 against its published sequence."""

from __future__ import annotations

import numpy as np
import pytest

from dmaproof.splitmix import GOLDEN, MASK, splitmix64
from dmaproof.units import div_ceil


@pytest.mark.parametrize(
    ("dividend", "divisor", "quotient"),
    [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2), ((1 << 64) - 1, 4096, 1 << 52), (-9, 8, -1)],
)
def test_a_quotient_is_rounded_up(dividend: int, divisor: int, quotient: int) -> None:
    assert div_ceil(dividend, divisor) == quotient


def test_splitmix64_gives_the_published_sequence() -> None:
    """The first outputs for seed 1234567, as Vigna's reference implementation prints them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    counters = [(1234567 + step * GOLDEN) & MASK for step in range(5)]
    assert [splitmix64(counter) for counter in counters] == published
    assert splitmix64(np.array(counters, dtype=np.uint64)).tolist() == published
