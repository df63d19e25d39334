"""Patterns of dirty pages, as a device's hardware reports them.

A report is one 4 KiB page, as in lists of addresses and in walks over page tables. The *density* is
the share of the guest's pages that are dirty. The *locality* is the position of the dirty pages and
the order of their reports:

sequential
    one run from the guest's start, in ascending order: a stream into a large buffer
clustered
    runs of `CLUSTER_PAGES` pages, the runs in random order: many buffers of a file system
scattered
    single pages, in random order: a database
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..units import PAGE_BYTES, div_ceil

CLUSTER_PAGES: Final = 64
MOST_REPORTS: Final = 1 << 20
"""The most reports that are measured; the cost of more is computed (see `iterator.measure`)."""


class Locality(StrEnum):
    """The positions of the dirty pages in the guest."""

    SEQUENTIAL = "sequential"
    CLUSTERED = "clustered"
    SCATTERED = "scattered"


@dataclass(frozen=True)
class Pattern:
    """Dirty pages of a guest of `guest_bytes`."""

    guest_bytes: int
    density: float
    locality: Locality

    @property
    def guest_pages(self) -> int:
        """The number of the guest's pages."""
        return self.guest_bytes // PAGE_BYTES

    @property
    def reports(self) -> int:
        """The number of dirty pages, at least one."""
        return max(1, round(self.guest_pages * self.density))

    def pages(self, seed: int) -> NDArray[np.uint64]:
        """Return the numbers of the dirty pages, each once, in the order of their reports.

        The array has shape (reports,), or (`MOST_REPORTS`,) if there are more.
        """
        count = min(self.reports, MOST_REPORTS)
        if self.locality == Locality.SEQUENTIAL:
            return np.arange(count, dtype=np.uint64)
        run = CLUSTER_PAGES if self.locality == Locality.CLUSTERED else 1
        rng = np.random.default_rng(seed)
        starts = _sample(rng, max(1, self.guest_pages // run), div_ceil(count, run))
        pages = (starts[:, None] * run + np.arange(run, dtype=np.uint64)).ravel()
        return pages[:count].astype(np.uint64)


def _sample(rng: np.random.Generator, population: int, count: int) -> NDArray[np.uint64]:
    """Return `count` different numbers below `population`, in random order."""
    if 2 * count > population:
        return rng.permutation(population)[:count].astype(np.uint64)
    numbers = np.unique(rng.integers(0, population, count, dtype=np.uint64))
    while len(numbers) < count:
        more = rng.integers(0, population, count - len(numbers), dtype=np.uint64)
        numbers = np.unique(np.concatenate((numbers, more)))
    return rng.permutation(numbers)
