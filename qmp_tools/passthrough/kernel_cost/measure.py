"""The program in L1: measures each row in instructions.

python3 -m qmp_tools.passthrough.kernel_cost.measure RESULTS [--most BYTES]
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.iova_bitmap import IovaRange
from dmaproof.units import PAGE_BYTES, div_ceil
from dmaproof.vfio import abi
from dmaproof.vfio.abi import Feature
from dmaproof.vfio.device import VfioDevice
from dmaproof.vfio.iommufd import Iommufd
from dmaproof.vfio.requests import Bits, address_of, bitmap_for, feature
from dmaproof.vfio.type1 import Container

from ..fake_device import FakeDevice, fake_device
from ..mock_iommu import APERTURE, HUGE_ENTRY_BYTES, MockIommu, mock_iommu
from .yardsticks import timed, yardsticks

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
WINDOW_PAGES: Final = 512
"""The pages of bitmap that the kernel pins at a time: as many pointers as fit in a page."""
PAGE_BITS: Final = PAGE_BYTES * 8
DENSITIES: Final = (1e-6, 1e-4, 1e-2, 1.0)

REPORT_SIZES: Final = (64 * MIB, GIB, 16 * GIB, 64 * GIB, 256 * GIB, TIB, 4 * TIB, 16 * TIB)
_TYPE1_SIZES: Final = (64 * MIB, GIB, 16 * GIB, 64 * GIB, 256 * GIB, TIB, 4 * TIB)
_SMALL_ENTRIES: Final = (64 * MIB, 256 * MIB, GIB, 1984 * MIB)
"""The last is the most that the test device can reach, 2 GiB less 16 MiB, in steps of _CHUNK."""
_HUGE_ENTRIES: Final = (64 * MIB, GIB, 8 * GIB)
_CHUNK: Final = 64 * MIB
_IOVA: Final = 1 << 32
_MOST_SETS: Final = 4 << 20
_DOWNWARDS: Final = 256
_WRITTEN: Final = 1000
_REPEATS: Final = 3
_NORESERVE: Final = 0x4000  # MAP_NORESERVE; Python's mmap has no name for it


@dataclass(frozen=True)
class Pinned:
    """The pages of a bitmap that the kernel pins, window by window."""

    windows: int
    pages: int
    """The sum over all windows."""
    faults: int
    """Pages that were missing and had to be faulted in."""
    after_missing: int
    """Present pages that follow a missing one in their window.

    The kernel leaves its fast path at the first missing page (gup_fast_fallback).
    """


@dataclass(frozen=True)
class Row:
    """One request for the dirty pages of `bytes` of IOVA in 4 KiB pages.

    `pattern` is 'none'; or the share of dirty pages, reported one by one in ascending order; or
    'contiguous', all pages in one range; or 'downwards', single pages in descending order. `sets`
    ranges were passed to the iterator, and `entries` of a page table visited. If `fresh`, no page
    of the bitmap had been touched before, as with QEMU's bitmap; else all were present.
    """

    interface: str
    bytes: int
    pattern: str
    fresh: bool
    sets: int
    pinned: Pinned
    filled: int
    """Words of the bitmap that are filled entirely, or copied."""
    entries: int
    instructions: int


@dataclass(frozen=True)
class Comb:
    """`count` ranges of `length` bytes, `stride` bytes apart, the first `offset` bytes in."""

    pattern: str
    offset: int
    length: int
    count: int
    stride: int


def combs(size: int) -> Iterator[Comb]:
    """Yield the patterns of dirty pages in a guest of `size` bytes, as ranges for the iterator."""
    pages = size // PAGE_BYTES
    yield Comb("none", 0, 0, 0, 0)
    for density in DENSITIES:
        count = int(pages * density)
        if not count:
            continue
        yield Comb(f"{density:g}", 0, PAGE_BYTES, count, size // count // PAGE_BYTES * PAGE_BYTES)
    yield Comb("contiguous", 0, size, 1, 0)
    count = min(_DOWNWARDS, pages // 64)
    stride = size // count // PAGE_BYTES * PAGE_BYTES
    yield Comb("downwards", (count - 1) * stride, PAGE_BYTES, count, -stride)


def pinned(size: int, comb: Comb, *, fresh: bool) -> Pinned:
    """Return what iova_bitmap pins of the bitmap for `size` bytes of IOVA to set `comb`.

    As in iova_bitmap_get() and iova_bitmap_advance_to(), a window begins at the byte of the bit
    that is to be set, and ends with its last page or with the bitmap.
    """
    total = div_ceil(size // PAGE_BYTES, PAGE_BITS)
    windows = pages = faults = after_missing = number = 0
    lowest, highest = total, 0  # of the pages that were pinned before
    bit, left = comb.offset // PAGE_BYTES, comb.length // PAGE_BYTES
    while number < comb.count:
        first = bit // PAGE_BITS
        last = min(total, first + WINDOW_PAGES)
        missing = max(0, min(last, lowest) - first) + max(0, last - max(first, lowest, highest))
        windows += 1
        pages += last - first
        faults += missing
        after_missing += last - first - missing if first < lowest else 0
        lowest, highest = min(first, lowest), max(last, highest)
        if comb.stride < 0:
            number += 1
        elif bit + left > last * PAGE_BITS:  # one range that is wider than a window
            left -= last * PAGE_BITS - bit
            bit = last * PAGE_BITS
            continue
        else:
            number += div_ceil(last * PAGE_BITS - bit, max(1, comb.stride // PAGE_BYTES))
        bit = (comb.offset + number * comb.stride) // PAGE_BYTES
    return Pinned(windows, pages, faults, after_missing) if fresh else Pinned(windows, pages, 0, 0)


def _memory(length: int, *, fresh: bool) -> NDArray[np.uint64]:
    """Return a bitmap of `length` bytes in whole pages: missing if `fresh`, else present."""
    size = div_ceil(length, PAGE_BYTES) * PAGE_BYTES
    mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    memory = np.frombuffer(mapping, dtype=np.uint64)
    if not fresh:
        memory[:] = 0
    return memory


class _Clock:
    """Counts the instructions of a request, less those of a request that does nothing."""

    def __init__(self, device: VfioDevice) -> None:
        def null_request() -> None:
            feature(device.fd, Feature.DMA_LOGGING_START, abi.FEATURE_SET | abi.FEATURE_PROBE)

        null_request()
        self.null = min(timed(null_request) for _ in range(20))

    def least(self, prepare: Callable[[], Callable[[], object]]) -> int:
        """Return the fewest instructions of some calls, each returned by `prepare`."""
        return max(0, min(timed(prepare()) for _ in range(_REPEATS)) - self.null)


def _dirty(bits: Bits) -> int:
    return sum(int(np.bitwise_count(part).sum()) for part in np.array_split(bits, 64))


# VFIO's REPORT -----------------------------------------------------------------------------------


def _report_rows(
    fake: FakeDevice, device: VfioDevice, clock: _Clock, sizes: Sequence[int]
) -> Iterator[Row]:
    device.start_logging([IovaRange(0, 1 << 52)], PAGE_BYTES)
    for size in sizes:
        words = size // PAGE_BYTES // 64
        present = _memory(words * 8, fresh=False)
        for comb in combs(size):
            if comb.count > _MOST_SETS:
                continue
            for fresh in (False, True):
                yield _report_row(fake, device, clock, size, comb, None if fresh else present)
    device.stop_logging()


def _report_row(
    fake: FakeDevice,
    device: VfioDevice,
    clock: _Clock,
    size: int,
    comb: Comb,
    present: Bits | None,
) -> Row:
    bitmaps: list[Bits] = []

    def prepare() -> Callable[[], object]:
        bitmaps.clear()
        bits = _memory(size // PAGE_BYTES // 8, fresh=True) if present is None else present
        bits = bits[: size // PAGE_BYTES // 64]
        bitmaps.append(bits)
        if comb.count:
            fake.mark_comb(_IOVA + comb.offset, comb.length, comb.count, comb.stride)
        return lambda: device.report(_IOVA, size, PAGE_BYTES, bits)

    if present is not None:
        present[:] = 0
    instructions = clock.least(prepare)
    reported = _dirty(bitmaps[0])
    expected = comb.count * comb.length // PAGE_BYTES
    if reported != expected:
        raise RuntimeError(
            f"REPORT, {size} bytes, {comb.pattern}: expected {expected} pages, got {reported}"
        )
    return Row(
        interface="report",
        bytes=size,
        pattern=comb.pattern,
        fresh=present is None,
        sets=comb.count,
        pinned=pinned(size, comb, fresh=present is None),
        filled=len(bitmaps[0]) if comb.pattern == "contiguous" else 0,
        entries=0,
        instructions=instructions,
    )


# iommufd's GET_DIRTY_BITMAP ----------------------------------------------------------------------


def _hwpt_rows(clock: _Clock, sizes: Sequence[int], *, huge: bool) -> Iterator[Row]:
    entry = HUGE_ENTRY_BYTES if huge else PAGE_BYTES
    with mock_iommu(_CHUNK, huge=huge) as mock:
        mock.iommufd.set_dirty_tracking(mock.hwpt, True)
        mapped = _CHUNK
        for size in sizes:
            while mapped < size:  # the same memory at further IOVAs
                mock.iommufd.map(mock.ioas, APERTURE + mapped, address_of(mock.memory), _CHUNK)
                mapped += _CHUNK
            for density in (0.0, *DENSITIES):
                yield _hwpt_row(mock, clock, size, entry, density)


def _hwpt_row(mock: MockIommu, clock: _Clock, size: int, entry: int, density: float) -> Row:
    entries = size // entry
    count = max(1, int(entries * density)) if density else 0
    marks = bitmap_for(size, entry)
    chosen = np.linspace(0, entries - 1, count).astype(np.int64)
    np.bitwise_or.at(marks, chosen // 64, np.uint64(1) << (chosen % 64).astype(np.uint64))
    found = bitmap_for(size, PAGE_BYTES)

    def prepare() -> Callable[[], object]:
        if count:
            mock.set_dirty(APERTURE, size, entry, marks)
        found[:] = 0
        return lambda: mock.iommufd.get_dirty_bitmap(
            mock.hwpt, APERTURE, size, PAGE_BYTES, bits=found
        )

    instructions = clock.least(prepare)
    expected = len(np.unique(chosen)) * (entry // PAGE_BYTES)
    if _dirty(found) != expected:
        raise RuntimeError(
            f"GET_DIRTY_BITMAP, {size} bytes, {density:g}: expected {expected} pages, "
            f"got {_dirty(found)}"
        )
    bitmap_pages = div_ceil(found.nbytes, PAGE_BYTES) if count else 0
    return Row(
        interface="hwpt" if entry == PAGE_BYTES else "hwpt, huge entries",
        bytes=size,
        pattern=f"{density:g}" if density else "none",
        fresh=False,
        sets=count,
        pinned=Pinned(min(1, count), bitmap_pages, 0, 0),
        filled=0,
        entries=entries,
        instructions=instructions,
    )


# type1's DIRTY_PAGES -----------------------------------------------------------------------------


def _type1_rows(clock: _Clock, sizes: Sequence[int]) -> Iterator[Row]:
    with fake_device() as fake, Container() as container, container.open_device(fake.sysfs):
        for size in sizes:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            with mmap.mmap(-1, size, flags) as space:
                address = address_of(space)
                container.map(_IOVA, address, size)
                container.set_dirty_tracking(True)
                for written in (0, _WRITTEN):
                    for fresh in (False, True):
                        yield _type1_row(fake, container, clock, size, written, fresh)
                container.set_dirty_tracking(False)
                container.unmap(_IOVA, size)


def _type1_row(
    fake: FakeDevice, container: Container, clock: _Clock, size: int, written: int, fresh: bool
) -> Row:
    pages = np.linspace(0, size // PAGE_BYTES - 1, written).astype(np.uint64)
    present = None if fresh else _memory(size // PAGE_BYTES // 8, fresh=False)
    bitmaps: list[Bits] = []

    def prepare() -> Callable[[], object]:
        bitmaps.clear()
        bits = _memory(size // PAGE_BYTES // 8, fresh=True) if present is None else present
        bitmaps.append(bits)
        if written:
            fake.write(np.uint64(_IOVA) + pages * np.uint64(PAGE_BYTES), np.ones_like(pages))
        return lambda: container.get_dirty_bitmap(_IOVA, size, PAGE_BYTES, bits)

    instructions = clock.least(prepare)
    if _dirty(bitmaps[0]) != written:
        raise RuntimeError(
            f"type1, {size} bytes: expected {written} pages, got {_dirty(bitmaps[0])}"
        )
    pattern = f"{written} pages" if written else "none"
    words = size // PAGE_BYTES // 64
    faults = words * 8 // PAGE_BYTES if fresh else 0
    return Row(*("type1", size, pattern, fresh, 0, Pinned(0, 0, faults, 0), words, 0, instructions))


def rows(most: int) -> Iterator[Row]:
    """Measure guests up to `most` bytes, row by row."""
    reports, small, huge, type1 = (
        [size for size in sizes if size <= most]
        for sizes in (REPORT_SIZES, _SMALL_ENTRIES, _HUGE_ENTRIES, _TYPE1_SIZES)
    )
    with (
        fake_device() as fake,
        Iommufd() as iommufd,
        VfioDevice.open_cdev(fake.sysfs, iommufd) as device,
    ):
        device.attach(iommufd.alloc_ioas())
        clock = _Clock(device)
        yield from _report_rows(fake, device, clock, reports)
    yield from _hwpt_rows(clock, small, huge=False)
    yield from _hwpt_rows(clock, huge, huge=True)
    yield from _type1_rows(clock, type1)


def main() -> int:
    """Measure, and write the rows and the yardsticks as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--most", type=int, default=REPORT_SIZES[-1])
    arguments = parser.parse_args()
    found = []
    for row in rows(arguments.most):
        print(f"{row.interface}\t{row.bytes}\t{row.pattern}\t{row.instructions}", flush=True)
        found.append(asdict(row))
    results = {"kernel": platform.release(), "yardsticks": yardsticks(), "rows": found}
    arguments.results.write_text(json.dumps(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
