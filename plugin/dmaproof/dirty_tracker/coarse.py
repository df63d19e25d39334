"""The coarse tracker: it always reports every mapped page.

The legacy VFIO type1 interface does the same if neither the device nor the IOMMU tracks dirty
pages, because a page pinned for DMA may be written at any time (drivers/vfio/vfio_iommu_type1.c,
`update_user_bitmap`). A migration with this tracker is correct, but never converges: it ends only
because QEMU stops the guest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange
from .page_set import combine_ranges
from .tracker import EmulatedTracker


class Coarse(EmulatedTracker):
    """A tracker that reports every mapped page, written or not."""

    name: ClassVar[str] = "coarse"

    def __init__(self) -> None:
        self._mapped: list[IovaRange] | None = None

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        if self._mapped is not None:
            raise TrackerError("the coarse tracker is already tracking: call stop first")
        self._mapped = combine_ranges(ranges, len(ranges))
        return page_size

    def stop(self) -> None:
        self._mapped = None

    def dma(self, iova: int, length: int) -> None:
        """Do nothing: every mapped page counts as dirty anyway."""

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report every mapped page; all of them stay dirty."""
        if self._mapped is None:
            raise TrackerError("the coarse tracker is not tracking: call start first")
        for start, size in self._mapped:
            low, high = max(start, iova), min(start + size, iova + length)
            if low < high:
                bitmap.set(low, high - low)
