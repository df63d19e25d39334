"""SplitMix64 (Steele, Lea and Flood, 2014): pseudo-random 64-bit numbers from a seed.

The guests implement the same generator in C (``guests/workload.c``), so both sides make the same
numbers. Every function takes one number, or a NumPy array, on which it works element by element.
"""

from __future__ import annotations

from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

GOLDEN: Final = 0x9E3779B97F4A7C15
"""The step of SplitMix64's counter: 2**64 divided by the golden ratio, odd."""

MASK: Final = (1 << 64) - 1


@overload
def mix64(value: int) -> int: ...
@overload
def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def mix64(value: Any) -> Any:
    """Apply SplitMix64's finalizer, which maps 64-bit numbers one to one.

    Args:
        value: a number below 2**64, or an array of uint64.

    Returns:
        The mixed number, or an array of the same shape.
    """
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


@overload
def splitmix64(value: int) -> int: ...
@overload
def splitmix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def splitmix64(value: Any) -> Any:
    """Return the output of SplitMix64 for a value of its counter: one step, then `mix64`.

    Args:
        value: a number below 2**64, or an array of uint64.

    Returns:
        The number, or an array of the same shape.
    """
    return mix64(value + GOLDEN & MASK)
