"""The IOVA bitmap iterator: how a device reports dirty ranges without knowing where bits live.

Theory of operation
-------------------
A caller that wants the dirty pages of a range of IOVAs makes an `IovaBitmap` over its own memory
and passes it to the device's tracker. The tracker calls `set(iova, length)` for each dirty range,
in the order and the sizes that its hardware delivers. The tracker never sees the bits: it knows
neither their page size, nor their place in memory, nor the windows. `IovaBitmap` is the user-space
counterpart of the kernel's iova_bitmap (drivers/iommu/iommufd/iova_bitmap.c since 6.11).

One bit stands for one naturally aligned page: bit *n* of a bitmap over [iova, iova + length) is
page ``iova // page_size + n``. Bits are stored in little-endian 64-bit words, the form of VFIO's
and iommufd's bitmaps.

The memory is either a buffer or a file. Only one *window* of a file is mapped at a time, when `set`
needs it. A window corresponds to the kernel's pinned pages and has the same size: 512 pages of
bitmap, which stand for 64 GiB of 4 KiB pages. The last window stays mapped, so neighbouring reports
map nothing. `set_many` sorts its ranges by window, so it maps each window once, even for a million
scattered ranges.

What is promised
----------------
- A range sets the bit of every page that it touches, across windows, and no other bit.
- Bits are only set, never cleared. With ``shared`` (the default) they are set atomically, so
  several processes may report into one bitmap.
- A range that is not wholly inside the bitmap's range raises an error, and none of its bits is set.
  The kernel silently drops or truncates such a range; here that would hide a fault of the tracker.

Not promised: that a process without atomics or locks of its own sees the bits by the time `set`
returns.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import BitmapError
from .units import div_ceil

ADDRESS_SPACE: Final = 1 << 64
WINDOW_BYTES: Final = 2 << 20
"""512 pages of bitmap: as much as the kernel pins at a time."""

BitmapBuffer = bytearray | memoryview | mmap.mmap | NDArray[Any]
Words = NDArray[np.uint64]
Addresses = NDArray[Any] | Sequence[int]


class IovaRange(NamedTuple):
    """A range of IOVAs.

    Example:
        >>> IovaRange(0x1000, 8192)
        IovaRange(iova=4096, length=8192)
    """

    iova: int
    """The first IOVA."""
    length: int
    """The number of bytes."""


@dataclass
class BitmapStats:
    """The cost of an iteration."""

    windows: int = 0
    """The number of windows mapped."""
    pages: int = 0
    """The number of host pages in these windows."""
    ranges: int = 0
    """The number of ranges reported."""
    bits: int = 0
    """The number of bits set that were clear before."""


Report = Callable[["IovaBitmap", int, int], None]


def _as_addresses(values: Addresses, name: str) -> Words:
    """Return `values` as a contiguous array of uint64; a value that does not fit never wraps."""
    try:
        array = np.asarray(values, dtype=None if isinstance(values, np.ndarray) else np.uint64)
    except (OverflowError, ValueError, TypeError) as error:
        raise BitmapError(f"{name} are not unsigned 64-bit numbers: {error}") from error
    if array.dtype.kind not in "ui" or (array.dtype.kind == "i" and (array < 0).any()):
        raise BitmapError(f"{name} of type {array.dtype} are not unsigned 64-bit numbers")
    if array.ndim != 1:
        raise BitmapError(f"{name}: expected an array of one dimension, got shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.uint64)


class IovaBitmap:
    """A dirty bitmap over a range of IOVAs, with one bit for each page.

    Use it as a context manager: the end of the ``with`` block releases the bitmap's memory.

    Args:
        iova: the first IOVA of the range.
        length: the length of the range in bytes.
        page_size: the size in bytes of the page that one bit stands for; a power of two up to
            2**63.
        data: the memory of the bits: a writable buffer at any address, or a file descriptor. A
            buffer may end in the middle of a word; bits after the last page are never touched.
        offset: the byte of the file at which the bitmap begins.
        window_bytes: the number of bytes of the file that are mapped at a time; a power of two, at
            least a host page.
        shared: whether bits are set atomically. False is for a bitmap with a single writer.

    Raises:
        BitmapError: the range is empty or leaves the 64-bit space, the page size is not a power of
            two up to 2**63, or the buffer or file is too short or read-only.

    Example:
        >>> words = bytearray(8)
        >>> with IovaBitmap(0, 64 * 4096, 4096, words) as bitmap:
        ...     bitmap.set(0x1fff, 2)
        ...     bitmap.count()
        2
        >>> words[0]
        6
    """

    def __init__(
        self,
        iova: int,
        length: int,
        page_size: int,
        data: BitmapBuffer | int,
        *,
        offset: int = 0,
        window_bytes: int = WINDOW_BYTES,
        shared: bool = True,
    ) -> None:
        if page_size < 1 or page_size & (page_size - 1) or page_size > 1 << 63:
            raise BitmapError(f"page size {page_size:#x} is not a power of two up to 2**63")
        if iova < 0 or length < 1 or iova + length > ADDRESS_SPACE:
            raise BitmapError(
                f"IOVA {iova:#x} + {length:#x}: the range is empty or leaves the 64-bit space"
            )
        if window_bytes < mmap.PAGESIZE or window_bytes & (window_bytes - 1):
            raise BitmapError(
                f"window of {window_bytes} bytes: expected a power of two, at least {mmap.PAGESIZE}"
            )
        self.iova = iova
        """The first IOVA of the range."""
        self.length = length
        """The length of the range in bytes."""
        self.page_size = page_size
        """The size in bytes of the page that one bit stands for."""
        self.stats = BitmapStats()
        """The cost of the reports so far."""
        self._last = iova + length - 1
        self._shift = page_size.bit_length() - 1
        self._origin = iova >> self._shift
        self.bits = (self._last >> self._shift) - self._origin + 1
        """The number of pages, and of bits, that the range touches."""
        self._shared = shared
        self._window: memoryview | None = None
        self._window_index = -1
        self._mapping: mmap.mmap | None = None
        self._fd = -1
        needed = div_ceil(self.bits, 8)
        if isinstance(data, int):
            self._open_file(data, offset, needed, window_bytes)
        else:
            self._open_buffer(data, needed)

    def _open_buffer(self, data: BitmapBuffer, needed: int) -> None:
        try:
            # typeshed declares mmap a buffer only from Python 3.12 on.
            view = memoryview(cast(bytearray, data)).cast("B")
        except TypeError as error:
            raise BitmapError(f"the bitmap's memory is not a contiguous buffer: {error}") from error
        if view.readonly:
            raise BitmapError("the bitmap's memory is read-only")
        if len(view) < needed:
            raise BitmapError(
                f"{self.bits} pages need {needed} bytes of bitmap, but the buffer has {len(view)}"
            )
        self._window = view
        self._window_index = 0
        self._window_bits = self.bits
        self.stats.windows = 1
        self.stats.pages = div_ceil(needed, mmap.PAGESIZE)

    def _open_file(self, fd: int, offset: int, needed: int, window_bytes: int) -> None:
        try:
            size = os.fstat(fd).st_size
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            self._fd = os.dup(fd)
        except OSError as error:
            raise BitmapError(f"file descriptor {fd} cannot hold a bitmap: {error}") from error
        if not writable:
            self.close()
            raise BitmapError(f"file descriptor {fd} is not open for reading and writing")
        if offset < 0 or offset + needed > size:
            self.close()
            raise BitmapError(
                f"{self.bits} pages need {needed} bytes of bitmap from offset {offset} on, but the "
                f"file has {size}"
            )
        self._offset = offset
        self._needed = needed
        self._window_bits = window_bytes * 8

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the bitmap's memory. The bitmap cannot be used afterwards.

        A second call does nothing.
        """
        if self._window is not None:
            self._window.release()
            self._window = None
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._window_index = -1

    # Reporting ----------------------------------------------------------------------------------

    def for_each(self, report: Report) -> None:
        """Query a tracker for the whole range.

        An exception that `report` raises ends the iteration and reaches the caller.

        Args:
            report: called as ``report(bitmap, iova, length)``; it reports dirty ranges by `set` or
                `set_many`. `EmulatedTracker.read_and_clear` is such a function.
        """
        report(self, self.iova, self.length)

    def set(self, iova: int, length: int) -> None:
        """Set the bit of every page that a range touches.

        Args:
            iova: the first IOVA of the range.
            length: the length of the range in bytes, at least 1.

        Raises:
            BitmapError: the range is empty or not wholly inside the bitmap's range; no bit was set.
        """
        if iova < self.iova or length < 1 or iova + length - 1 > self._last:
            raise BitmapError(
                f"IOVA {iova:#x} + {length:#x} is empty or not inside the bitmap's range "
                f"{self.iova:#x} + {self.length:#x}"
            )
        self.stats.ranges += 1
        self._set_inside(iova, length)

    def _set_inside(self, iova: int, length: int) -> None:
        first = (iova >> self._shift) - self._origin
        end = ((iova + length - 1) >> self._shift) - self._origin + 1
        while first < end:
            index = first // self._window_bits
            start = index * self._window_bits
            stop = min(end, start + self._window_bits)
            window = self._pin(index)
            self.stats.bits += _core.set_bits(window, first - start, stop - first, self._shared)
            first = stop

    def set_many(self, iovas: Addresses, lengths: Addresses | int) -> None:
        """Set the bits of many ranges in one call.

        Args:
            iovas: the first IOVA of each range: shape (ranges,), unsigned 64-bit values.
            lengths: the length in bytes of each range, of the same shape; or one length for all
                ranges, as in the lists of pages that hardware writes.

        Raises:
            BitmapError: the arrays have different shapes, or a range is empty or not wholly inside
                the bitmap's range; no bit was set.

        Example:
            >>> with IovaBitmap(0, 64 * 4096, 4096, bytearray(8)) as bitmap:
            ...     bitmap.set_many([0x1000, 0x9000], 4096)
            ...     [hex(iova) for iova, length in bitmap.ranges()]
            ['0x1000', '0x9000']
        """
        iovas = _as_addresses(iovas, "IOVAs")
        if not isinstance(lengths, int):
            lengths = _as_addresses(lengths, "lengths")
            if lengths.shape != iovas.shape:
                raise BitmapError(
                    f"expected IOVAs and lengths of one shape, got {iovas.shape} and "
                    f"{lengths.shape}"
                )
        elif not 0 < lengths <= self.length:
            raise BitmapError(
                f"ranges of {lengths:#x} bytes are empty or longer than the bitmap's range of "
                f"{self.length:#x} bytes"
            )
        if self._fd < 0:
            self._set_in_window(0, iovas, lengths)
        else:
            if isinstance(lengths, int):
                lengths = np.full(iovas.shape, lengths, dtype=np.uint64)
            self._set_by_window(iovas, lengths)
        self.stats.ranges += len(iovas)

    def _refuse_outside(self, iovas: Words, lengths: Words | int) -> None:
        """Raise an error that names the first range that is empty or not wholly inside, if any."""
        sizes = np.asarray(lengths, dtype=np.uint64)
        ends = sizes - np.uint64(1)
        starts = iovas - np.uint64(self.iova)
        room = np.uint64(self.length - 1)
        outside = (sizes == 0) | (starts > room) | (ends > room - np.minimum(starts, room))
        if outside.any():
            worst = int(np.argmax(outside))
            length = int(np.broadcast_to(lengths, iovas.shape)[worst])
            raise BitmapError(
                f"range {worst} (IOVA {int(iovas[worst]):#x} + {length:#x}) is empty or not inside "
                f"the bitmap's range {self.iova:#x} + {self.length:#x}"
            )

    def _set_by_window(self, iovas: Words, lengths: Words) -> None:
        """Set ranges in the order of their windows, so that each window is mapped once.

        Ranges that cross windows are set one by one before the others.
        """
        self._refuse_outside(iovas, lengths)
        lasts = iovas + (lengths - np.uint64(1))
        first, last = self._windows_of(iovas), self._windows_of(lasts)
        crossing = first != last
        if crossing.any():
            for iova, length in np.stack((iovas, lengths), 1)[crossing].tolist():
                self._set_inside(iova, length)
            iovas, lengths, first = iovas[~crossing], lengths[~crossing], first[~crossing]
        if (first[1:] < first[:-1]).any():
            order = np.argsort(first, kind="stable")
            iovas, lengths, first = iovas[order], lengths[order], first[order]
        edges = np.flatnonzero(np.diff(first)) + 1
        for low, high in pairwise([0, *edges.tolist(), len(first)] if len(first) else []):
            self._set_in_window(int(first[low]), iovas[low:high], lengths[low:high])

    def _windows_of(self, iovas: Words) -> NDArray[np.unsignedinteger[Any]]:
        """Return each IOVA's window number, in the smallest type: short keys sort fast."""
        if self.bits <= self._window_bits:
            return np.zeros(len(iovas), dtype=np.uint8)
        shift = self._shift + self._window_bits.bit_length() - 1
        windows = (iovas - np.uint64(self._start_of(0))) >> np.uint64(shift)
        return windows.astype(np.min_scalar_type(self.bits // self._window_bits))

    def _set_in_window(self, index: int, iovas: Words, lengths: Words | int) -> None:
        window = self._pin(index)
        low = max(self.iova, self._start_of(index))
        high = min(self._last, self._start_of(index + 1) - 1)
        try:
            self.stats.bits += _core.set_ranges(
                window, low, high, self._shift, iovas, lengths, self._shared
            )
        except ValueError as error:
            self._refuse_outside(iovas, lengths)
            raise BitmapError(str(error)) from error

    # Iterating ----------------------------------------------------------------------------------

    def windows(self) -> Iterator[IovaRange]:
        """Yield the range in pieces, one for each window, for hardware queried by window."""
        for index in range(div_ceil(self.bits, self._window_bits)):
            low = max(self.iova, self._start_of(index))
            yield IovaRange(low, min(self._last + 1, self._start_of(index + 1)) - low)

    def ranges(self) -> Iterator[IovaRange]:
        """Yield the dirty ranges, merged, in order, and clipped to the bitmap's own range."""
        pending: IovaRange | None = None
        for index in range(div_ceil(self.bits, self._window_bits)):
            start = index * self._window_bits
            count = min(self._window_bits, self.bits - start)
            runs = np.frombuffer(_core.find_set(self._pin(index), 0, count), dtype=np.uint64)
            for first, pages in runs.reshape(-1, 2).tolist():
                low = self._origin + start + first << self._shift
                high = min(low + (pages << self._shift), self._last + 1)
                low = max(low, self.iova)
                if pending is not None and pending.iova + pending.length == low:
                    pending = IovaRange(pending.iova, high - pending.iova)
                    continue
                if pending is not None:
                    yield pending
                pending = IovaRange(low, high - low)
        if pending is not None:
            yield pending

    def count(self) -> int:
        """Count the dirty pages."""
        windows = range(div_ceil(self.bits, self._window_bits))
        sizes = (min(self._window_bits, self.bits - index * self._window_bits) for index in windows)
        return sum(
            _core.count_bits(self._pin(index), 0, size)
            for index, size in zip(windows, sizes, strict=True)
        )

    # Windows ------------------------------------------------------------------------------------

    def _start_of(self, index: int) -> int:
        """Return the IOVA of a window's first page."""
        return self._origin + index * self._window_bits << self._shift

    def _pin(self, index: int) -> memoryview:
        """Return the bits of a window; map the window first unless it is the current one."""
        if index != self._window_index or self._window is None:
            self._map_window(index)
        assert self._window is not None
        return self._window

    def _map_window(self, index: int) -> None:
        if self._fd < 0:
            raise BitmapError("the bitmap has been closed")
        start = index * self._window_bits // 8
        size = min(self._window_bits // 8, self._needed - start)
        before = (self._offset + start) % mmap.ALLOCATIONGRANULARITY
        if self._window is not None:
            self._window.release()
        if self._mapping is not None:
            self._mapping.close()
        self._window = self._mapping = None
        try:
            self._mapping = mmap.mmap(self._fd, size + before, offset=self._offset + start - before)
        except (OSError, ValueError) as error:
            raise BitmapError(f"a window of the bitmap cannot be mapped: {error}") from error
        whole = memoryview(self._mapping)
        self._window = whole[before:]
        whole.release()
        self._window_index = index
        self.stats.windows += 1
        self.stats.pages += div_ceil(size + before, mmap.PAGESIZE)
