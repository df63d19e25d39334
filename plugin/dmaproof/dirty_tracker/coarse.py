"""The coarse tracker: every mapped page is reported, always.

That is what the legacy VFIO type1 interface answers where neither the device nor the IOMMU tracks
anything: pages pinned for DMA may have been written at any time
(drivers/vfio/vfio_iommu_type1.c, `update_user_bitmap`). A migration with it is right, and ends only
because QEMU stops the guest at last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange
from .page_set import combine_ranges
from .tracker import EmulatedTracker


class Coarse(EmulatedTracker):
    """Reports what is mapped, written or not."""

    name: ClassVar[str] = "coarse"

    def __init__(self) -> None:
        self._mapped: list[IovaRange] | None = None

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        if self._mapped is not None:
            raise TrackerError("the coarse tracker tracks already")
        self._mapped = combine_ranges(ranges, len(ranges))
        return page_size

    def stop(self) -> None:
        self._mapped = None

    def dma(self, iova: int, length: int) -> None:
        """Remember nothing: what is mapped counts as dirty anyway."""

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report what is mapped, which stays dirty."""
        if self._mapped is None:
            raise TrackerError("the coarse tracker does not track: call start first")
        for start, size in self._mapped:
            low, high = max(start, iova), min(start + size, iova + length)
            if low < high:
                bitmap.set(low, high - low)
