"""The cost of the C core, relative to the fastest operation of the machine at the same moment.

Absolute times say little on a shared machine. So every figure is the ratio of the medians of two
operations that took turns: setting bits against the kernel's algorithm (`strategies.on_demand`),
merging against memcpy, harvesting against memchr, and comparing RAM against memcmp.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..iova_bitmap import WINDOW_BYTES, IovaBitmap
from ..page_compare import Extent, differing_pages
from ..units import PAGE_BYTES
from . import strategies

REPORTS: Final = 1_000_000
BITMAP_BYTES: Final = 32 << 20
"""The bitmap of a guest of 1 TiB."""
RAM_BYTES: Final = 512 << 20

_libc = ctypes.CDLL(None)
for _name in ("memcmp", "memchr"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Ratio:
    """An operation of the core (`ours_s`) and its yardstick, as medians in seconds.

    `speed` is the yardstick's time divided by the core's: above 1, the core is faster. `wanted` is
    the speed to reach.
    """

    what: str
    yardstick: str
    ours_s: float
    yardstick_s: float
    wanted: float

    @property
    def speed(self) -> float:
        """The speed relative to the yardstick."""
        return self.yardstick_s / self.ours_s

    @property
    def reached(self) -> bool:
        """Whether the core is as fast as wanted."""
        return self.speed >= self.wanted


def _in_turns(
    core: Callable[[], float], yardstick: Callable[[], float], repeats: int
) -> tuple[float, float]:
    pairs = [(core(), yardstick()) for _ in range(repeats + 1)][1:]  # the first pair is a warm-up
    return statistics.median(pair[0] for pair in pairs), statistics.median(
        pair[1] for pair in pairs
    )


def _seconds(work: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _aligned(size: int) -> Bytes:
    """Return zeroed memory on a page boundary, all of it allocated."""
    whole = np.empty(size + PAGE_BYTES, dtype=np.uint8)
    start = -whole.ctypes.data % PAGE_BYTES
    piece = whole[start : start + size]
    piece[:] = 0
    return piece


def setting(repeats: int) -> Iterator[Ratio]:
    """Measure page reports over 1 TiB and in one window, against the kernel's algorithm."""
    rng = np.random.default_rng(1)
    bitmap = _aligned(BITMAP_BYTES)
    everywhere = BITMAP_BYTES * 8
    inside = WINDOW_BYTES * 8
    random = rng.integers(0, inside, REPORTS, dtype=np.uint64)
    cases = [
        ("scattered over 1 TiB", rng.integers(0, everywhere, REPORTS, dtype=np.uint64), 25.0, 25.0),
        ("random in one window", random, 1 / 1.3, 2.0),
        ("sorted in one window", np.sort(random), 1 / 1.3, 1.0),
        ("in a row in one window", np.arange(REPORTS, dtype=np.uint64), 1 / 1.3, 2.0),
    ]
    for name, pages, wanted, wanted_private in cases:
        data = bitmap if name.startswith("scattered") else bitmap[:WINDOW_BYTES]
        for shared in (True, False):
            ours_s, kernel_s = _in_turns(
                partial(_set, data, pages, shared),
                partial(_kernel, data, pages),
                repeats,
            )
            yield Ratio(
                f"{'set atomically' if shared else 'set'}: {name}",
                "window on demand",
                ours_s,
                kernel_s,
                wanted if shared else wanted_private,
            )


def _set(data: Bytes, pages: NDArray[np.uint64], shared: bool) -> float:
    data[:] = 0
    iovas = pages * np.uint64(PAGE_BYTES)
    with IovaBitmap(0, data.nbytes * 8 * PAGE_BYTES, PAGE_BYTES, data, shared=shared) as bitmap:
        return _seconds(lambda: bitmap.set_many(iovas, PAGE_BYTES))


def _kernel(data: Bytes, pages: NDArray[np.uint64]) -> float:
    data[:] = 0
    return strategies.on_demand(data, pages, np.ones_like(pages))[0]


def merging(repeats: int) -> Iterator[Ratio]:
    """Measure the OR of one 32 MiB bitmap into another, against memcpy of as many bytes."""
    rng = np.random.default_rng(2)
    into, source, copy = (_aligned(BITMAP_BYTES) for _ in range(3))
    bits = BITMAP_BYTES * 8

    def copy_all() -> float:
        return _seconds(lambda: ctypes.memmove(copy.ctypes.data, source.ctypes.data, copy.nbytes))

    def merge(first: int, shared: bool) -> float:
        into[:] = 0
        count = bits - 64
        return _seconds(lambda: _core.or_bits(into, first, source, 0, count, shared))

    source[rng.integers(0, BITMAP_BYTES, BITMAP_BYTES // 65536)] = 1
    for shared in (True, False):
        ours_s, copy_s = _in_turns(partial(merge, 0, shared), copy_all, repeats)
        name = "merge atomically" if shared else "merge"
        yield Ratio(f"{name} 32 MiB, sparse", "memcpy", ours_s, copy_s, 0.7)
    ours_s, copy_s = _in_turns(partial(merge, 3, True), copy_all, repeats)
    yield Ratio("merge atomically 32 MiB, sparse, 3 bits off", "memcpy", ours_s, copy_s, 0.7)
    source[:] = rng.integers(0, 256, BITMAP_BYTES, dtype=np.uint8)
    ours_s, copy_s = _in_turns(partial(merge, 0, False), copy_all, repeats)
    yield Ratio("merge 32 MiB, every word new", "memcpy", ours_s, copy_s, 0.7)


def harvesting(repeats: int) -> Iterator[Ratio]:
    """Measure the harvest of 500 dirty pages from a 32 MiB bitmap, against memchr."""
    data, zeros = _aligned(BITMAP_BYTES), _aligned(BITMAP_BYTES)
    dirty = np.random.default_rng(3).integers(0, BITMAP_BYTES, 500)

    def take() -> float:
        data[dirty] = 0x10
        return _seconds(lambda: _core.take_set(data, 0, BITMAP_BYTES * 8))

    ours_s, scan_s = _in_turns(
        take,
        lambda: _seconds(lambda: _libc.memchr(zeros.ctypes.data, 1, zeros.nbytes)),
        repeats,
    )
    yield Ratio("harvest 32 MiB, sparse", "memchr", ours_s, scan_s, 0.7)


def comparing(repeats: int) -> Iterator[Ratio]:
    """Measure the comparison of two equal RAMs of 512 MiB, without and with holes, page by page."""
    ram = [os.memfd_create("bench-ram", os.MFD_CLOEXEC) for _ in range(2)]
    try:
        content = np.random.default_rng(4).bytes(1 << 20)
        memory = []
        for fd in ram:
            os.ftruncate(fd, RAM_BYTES)
            for start in range(0, RAM_BYTES, len(content)):
                os.pwrite(fd, content, start)
            memory.append(np.fromfile(f"/proc/self/fd/{fd}", dtype=np.uint8))

        def compare_all() -> float:
            addresses = [piece.ctypes.data for piece in memory]
            return _seconds(lambda: _libc.memcmp(*addresses, RAM_BYTES))

        def compare_pages() -> float:
            differing = np.zeros(RAM_BYTES // PAGE_BYTES // 8, dtype=np.uint8)
            return _seconds(
                lambda: _core.differing_pages(memory[0], memory[1], PAGE_BYTES, differing)
            )

        ours_s, memcmp_s = _in_turns(compare_pages, compare_all, repeats)
        yield Ratio("compare RAM, page by page", "memcmp", ours_s, memcmp_s, 0.9)
        for fd in ram:
            _punch_holes(fd)
        ours_s, memcmp_s = _in_turns(
            lambda: _seconds(lambda: differing_pages(Extent(ram[0]), Extent(ram[1]), RAM_BYTES)),
            compare_all,
            repeats,
        )
        yield Ratio("compare RAM files, 7 of 8 MiB holes", "memcmp", ours_s, memcmp_s, 1.0)
    finally:
        for fd in ram:
            os.close(fd)


def _punch_holes(fd: int) -> None:
    """Leave one MiB of every eight, as in a guest that has used little of its RAM."""
    keep_size, punch_hole = 1, 2  # FALLOC_FL_*
    for start in range(0, RAM_BYTES, 8 << 20):
        hole = ctypes.c_int64(start + (1 << 20))
        if _libc.fallocate(fd, keep_size | punch_hole, hole, ctypes.c_int64(7 << 20)):
            raise OSError("fallocate cannot make holes in a memfd on this machine")


def measure(repeats: int = 9) -> Iterator[Ratio]:
    """Measure every ratio, one after the other."""
    for part in (setting, merging, harvesting, comparing):
        yield from part(repeats)
