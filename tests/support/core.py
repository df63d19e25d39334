"""What tests of the C core share: bitmaps as numbers, and tables of pages in AMD's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.dirty_tracker.page_table import TableLayout

PAGE: Final = 4096
HUGE: Final = 512 * PAGE
"""What one node of level 1 maps."""

PRESENT: Final = 1
DIRTY: Final = 1 << 6
NODE: Final = 1 << 9
GROUP: Final = 7 << 9
"""Fields of an entry of AMD's page tables."""

Bytes = bytearray | memoryview


def words(numbers: Sequence[int]) -> NDArray[np.uint64]:
    """Return `numbers` as an array of 64-bit words."""
    return np.array(numbers, dtype=np.uint64)


def as_number(data: Bytes | bytes) -> int:
    """Return a bitmap as one number, whose bit n is bit n."""
    return int.from_bytes(data, "little")


def pairs(data: bytes) -> list[tuple[int, int]]:
    """Return the runs, as first bit and length, that the core has found."""
    return [(start, length) for start, length in np.frombuffer(data, "<u8").reshape(-1, 2).tolist()]


def amd(levels: int, *, root: int = 0, group: int = GROUP) -> TableLayout:
    """Return the AMD IOMMU's layout; its groups can be left out."""
    return TableLayout(
        root, levels, PRESENT, DIRTY, (1 << 52) - PAGE, kind=GROUP, node=NODE, group=group
    )
