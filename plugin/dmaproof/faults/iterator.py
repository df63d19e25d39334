"""Faults of the iterator: not all ranges that a tracker reports become dirty bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..dirty_log import LOG_PAGE_BYTES
from ..iova_bitmap import Addresses, IovaBitmap
from ..trace import Link, TracedBitmap
from .fault import Fault

_WINDOW_PAGES: Final = 64
"""One word of the bitmap."""
_PAGE: Final = np.uint64(LOG_PAGE_BYTES)

Ranges = tuple[NDArray[np.uint64], NDArray[np.uint64]]
"""IOVAs and lengths in bytes, of the same shape."""


class _Iterator(Fault):
    """A fault that sets other ranges than those reported."""

    link = Link.ITERATOR

    def make_bitmap(self, *arguments: Any) -> TracedBitmap:
        """Return an iterator that sets the ranges that `spoil` returns."""
        bitmap = _SpoiltBitmap(*arguments)
        bitmap.spoil = self.spoil
        return bitmap

    def spoil(
        self, bitmap: IovaBitmap, iovas: NDArray[np.uint64], ends: NDArray[np.uint64]
    ) -> Ranges:
        """Return the starts and ends (exclusive) to set instead; empty ranges are not set."""
        raise NotImplementedError


class _SpoiltBitmap(TracedBitmap):
    spoil: Callable[[IovaBitmap, NDArray[np.uint64], NDArray[np.uint64]], Ranges]

    def set(self, iova: int, length: int) -> None:
        self.set_many([iova], [length])

    def set_many(self, iovas: Addresses, lengths: Addresses | int) -> None:
        starts = np.asarray(iovas, dtype=np.uint64)
        sizes = np.broadcast_to(np.asarray(lengths, dtype=np.uint64), starts.shape)
        self.see_many(starts, sizes)
        self._set_spoiled(starts, sizes)

    def _set_spoiled(self, iovas: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> None:
        starts, ends = self.spoil(self, iovas, iovas + lengths)
        left = starts < ends
        IovaBitmap.set_many(self, starts[left], ends[left] - starts[left])


class SkipWindow(_Iterator):
    """The iterator skips one in eight windows of 256 KiB."""

    name: ClassVar[str] = "skip-window"

    def spoil(
        self, bitmap: IovaBitmap, iovas: NDArray[np.uint64], ends: NDArray[np.uint64]
    ) -> Ranges:
        """Keep the pages outside the skipped windows."""
        pages = [
            np.arange(int(start), int(end), LOG_PAGE_BYTES, dtype=np.uint64)
            for start, end in zip(iovas // _PAGE * _PAGE, ends, strict=True)
        ]
        every = np.concatenate([np.empty(0, dtype=np.uint64), *pages])
        kept = every[every // _PAGE // np.uint64(_WINDOW_PAGES) % np.uint64(8) != self.seed % 8]
        return kept, kept + _PAGE


class ForgetLastWord(_Iterator):
    """The iterator skips the last word of a bitmap if the pages only partly fill the word."""

    name: ClassVar[str] = "forget-last-word"
    needs = "a device that writes the last pages of a slot"

    def spoil(
        self, bitmap: IovaBitmap, iovas: NDArray[np.uint64], ends: NDArray[np.uint64]
    ) -> Ranges:
        whole_words = bitmap.bits // 64 * 64
        limit = np.uint64(bitmap.iova // LOG_PAGE_BYTES * LOG_PAGE_BYTES) + _PAGE * np.uint64(
            whole_words
        )
        return iovas, np.minimum(ends, limit)


class OffByOneAtStart(_Iterator):
    """The iterator skips the first page of a range of several pages."""

    name: ClassVar[str] = "off-by-one-start"

    def spoil(
        self, bitmap: IovaBitmap, iovas: NDArray[np.uint64], ends: NDArray[np.uint64]
    ) -> Ranges:
        return np.where(ends - iovas > _PAGE, iovas + _PAGE, iovas), ends


class OffByOneAtEnd(_Iterator):
    """The iterator skips the last page of a range of several pages."""

    name: ClassVar[str] = "off-by-one-end"

    def spoil(
        self, bitmap: IovaBitmap, iovas: NDArray[np.uint64], ends: NDArray[np.uint64]
    ) -> Ranges:
        return iovas, np.where(ends - iovas > _PAGE, ends - _PAGE, ends)
