"""The kernel's three dirty trackers behind the `DirtyTracker` protocol.

The kernel reports whole pages (type1: whole mappings) and clears what it reports, but the collector
may ask for any range. So a `PageSet` keeps the dirty pages that the kernel has reported until the
collector asks for them, and nothing that was read is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from ..dirty_tracker.page_set import PageSet
from ..errors import TrackerError
from ..iova_bitmap import WINDOW_BYTES, IovaBitmap, IovaRange
from ..trace import set_bits
from .device import VfioDevice
from .iommufd import Iommufd
from .requests import Bits
from .type1 import Container

_QUERY_PAGES = WINDOW_BYTES * 8
"""The pages whose bitmap the kernel's iterator pins at a time."""


class KernelTracker(ABC):
    """The common part of the three trackers."""

    def __init__(self) -> None:
        self._pending: PageSet | None = None
        self._page_size = 0

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        if self._pending is not None:
            raise TrackerError("the kernel's tracker is already tracking: call stop first")
        self._page_size = self._begin(ranges, page_size)
        try:
            self._pending = PageSet(ranges, self._page_size)
        except TrackerError:
            self._end()
            raise
        return self._page_size

    def stop(self) -> None:
        if self._pending is not None:
            self._pending = None
            self._end()

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        if self._pending is None:
            raise TrackerError("the kernel's tracker is not tracking: call start first")
        for first, pages in self._pending.inside(iova, length):
            asked = IovaRange(first * self._page_size, pages * self._page_size)
            for query in self._queries(asked):
                words = self._read(query, self._page_size)
                dirty = set_bits(words, 0, query.length // self._page_size).astype(np.uint64)
                self._pending.add_pages(dirty + np.uint64(query.iova // self._page_size))
        self._pending.report(bitmap, iova, length)

    def _queries(self, asked: IovaRange) -> Iterator[IovaRange]:
        """Split `asked` into the ranges that the kernel is asked for."""
        step = _QUERY_PAGES * self._page_size
        end = asked.iova + asked.length
        for iova in range(asked.iova, end, step):
            yield IovaRange(iova, min(step, end - iova))

    @abstractmethod
    def _begin(self, ranges: Sequence[IovaRange], page_size: int) -> int: ...

    @abstractmethod
    def _end(self) -> None: ...

    @abstractmethod
    def _read(self, query: IovaRange, page_size: int) -> Bits: ...


class DmaLogging(KernelTracker):
    """The device's own tracker: VFIO's DMA logging."""

    def __init__(self, device: VfioDevice) -> None:
        super().__init__()
        self._device = device

    def _begin(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        return self._device.start_logging(ranges, page_size)

    def _end(self) -> None:
        self._device.stop_logging()

    def _read(self, query: IovaRange, page_size: int) -> Bits:
        return self._device.report(*query, page_size)


class HwptTracker(KernelTracker):
    """The IOMMU's dirty bits in a hardware page table that was made with dirty tracking."""

    def __init__(self, iommufd: Iommufd, hwpt: int) -> None:
        super().__init__()
        self._iommufd = iommufd
        self._hwpt = hwpt

    def _begin(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        self._iommufd.set_dirty_tracking(self._hwpt, True)
        return page_size

    def _end(self) -> None:
        self._iommufd.set_dirty_tracking(self._hwpt, False)

    def _read(self, query: IovaRange, page_size: int) -> Bits:
        return self._iommufd.get_dirty_bitmap(self._hwpt, *query, page_size)


class Type1Tracker(KernelTracker):
    """The legacy container's tracker: pages that are pinned, or were written through it."""

    def __init__(self, container: Container) -> None:
        super().__init__()
        self._container = container

    def _begin(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        self._container.set_dirty_tracking(True)
        return page_size

    def _end(self) -> None:
        self._container.set_dirty_tracking(False)

    def _queries(self, asked: IovaRange) -> Iterator[IovaRange]:
        """Yield whole mappings, because type1 refuses ranges that split a mapping."""
        for mapping in self._container.mappings:
            if mapping.iova < asked.iova + asked.length and asked.iova < sum(mapping):
                yield mapping

    def _read(self, query: IovaRange, page_size: int) -> Bits:
        return self._container.get_dirty_bitmap(*query, page_size)
