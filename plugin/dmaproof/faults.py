"""Planted faults: each a thin wrapper around one link of the chain.

A proof that never fails proves nothing. A planted fault breaks one link on purpose, from outside;
no production file knows of it. It keeps a list of what it spoilt, so that the verdict can be held
against it: only spoilt pages may be lost.

A fault is named ``NAME=VALUE``; its random choice follows from a seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .dirty_log import LOG_PAGE_BYTES, DirtyLog, Words
from .errors import UsageError
from .trace import set_bits


class Fault(Protocol):
    """Something that goes wrong in the chain."""

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """The broken form of `log`."""

    def planted(self) -> NDArray[np.uint64]:
        """GPAs of the pages that were kept from the log, sorted, each once."""


class NoFault:
    """A chain in which nothing goes wrong."""

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """`log` itself."""
        return log

    def planted(self) -> NDArray[np.uint64]:
        """No pages."""
        return np.empty(0, dtype=np.uint64)


class DropPages:
    """The bits of a seeded choice of pages never arrive; `rate` is their share, 0 to 1.

    The choice is by page and not by write: a bit that is lost once is healed when the same page is
    written and logged again.
    """

    def __init__(self, rate: str, seed: int) -> None:
        try:
            self._rate = float(rate)
        except ValueError:
            self._rate = -1.0
        if not 0 < self._rate <= 1:
            raise UsageError(
                f"fault drop-pages={rate}: a share of pages above 0 and up to 1 is due"
            )
        self._seed = seed
        self._dropped: set[int] = set()

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """A log that the chosen pages never reach."""
        return _DroppingLog(log, self)

    def planted(self) -> NDArray[np.uint64]:
        """The chosen pages that were dirty, and so kept from the log."""
        return np.array(sorted(self._dropped), dtype=np.uint64) * np.uint64(LOG_PAGE_BYTES)

    def drop(self, pages: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the dirty pages (numbers) are to be dropped; they are remembered."""
        chosen = _uniform(pages, self._seed) < self._rate
        self._dropped.update(pages[chosen].tolist())
        return chosen


class _DroppingLog:
    def __init__(self, log: DirtyLog, fault: DropPages) -> None:
        self._log = log
        self._fault = fault

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        dirty = set_bits(words, first_bit, pages)
        dropped = self._fault.drop(dirty.astype(np.uint64) + np.uint64(gpa // LOG_PAGE_BYTES))
        bits = np.zeros(-(-pages // 64) * 64, dtype=np.uint8)
        bits[dirty[~dropped]] = 1
        kept = np.packbits(bits, bitorder="little").view("<u8")
        self._log.merge(gpa, kept, 0, pages)

    def close(self) -> None:
        self._log.close()


def _uniform(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each of `numbers`, the same whenever the seed is (SplitMix64)."""
    value = numbers + np.uint64(seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    value = value ^ value >> np.uint64(31)
    return (value >> np.uint64(11)).astype(np.float64) * 2.0**-53


FAULTS: Final[dict[str, Callable[[str, int], Fault]]] = {
    "drop-pages": DropPages,
}


def plant(fault: str | None, seed: int) -> Fault:
    """The fault that ``NAME=VALUE`` names; None is the chain as it should be.

    Raises:
        UsageError: there is no such fault, or its value does not fit.
    """
    if fault is None:
        return NoFault()
    name, _, value = fault.partition("=")
    if name not in FAULTS:
        raise UsageError(f"fault {name!r} is not known; there are: {', '.join(sorted(FAULTS))}")
    return FAULTS[name](value, seed)
