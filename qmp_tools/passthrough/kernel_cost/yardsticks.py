"""Small programs that run in L1 and on the host, to convert instructions to time.

Each one resembles a part of what is measured: entering the kernel, faulting in a page of the
bitmap, finding a present page in the page table, and a loop over bits.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from dmaproof import _core
from dmaproof.units import PAGE_BYTES

_CALLS: Final = 20_000
_BYTES: Final = 32 << 20
"""The bitmap of 1 TiB."""
_SPACE: Final = _BYTES * 8 * PAGE_BYTES
_RANGES: Final = 200_000
_REPEATS: Final = 5
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python's mmap has no name for it


def yardsticks() -> dict[str, float]:
    """Return the nanoseconds of each unit of work; in L1 these are instructions.

    Raises:
        OSError: this kernel is older than Linux 5.14.
    """
    fresh, present = _populate()
    return {
        "system call": _least(_system_calls) / _CALLS,
        "bitmap page faulted in": fresh / (_BYTES // PAGE_BYTES),
        "bitmap page found": present / (_BYTES // PAGE_BYTES),
        "bit set nearby": _bits(_SPACE // 256) / _RANGES,
        "bit set far away": _bits(_SPACE) / _RANGES,
        "word filled": _filled() / (_BYTES // 8),
    }


def _least(call: Callable[[], object]) -> int:
    """Return the shortest of some runs, as disturbances can only lengthen a run."""
    return min(timed(call) for _ in range(_REPEATS))


def timed(call: Callable[[], object]) -> int:
    """Return the nanoseconds of one call."""
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def _system_calls() -> None:
    for _ in range(_CALLS):
        os.getppid()


def _populate() -> tuple[int, int]:
    """Return the times of populating missing pages, and of populating them again."""
    fresh: list[int] = []
    present: list[int] = []
    for _ in range(_REPEATS):
        with mmap.mmap(-1, _BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for times in (fresh, present):
                times.append(timed(lambda: memory.madvise(_MADV_POPULATE_WRITE)))
    return min(fresh), min(present)


def _bits(space: int) -> int:
    """Time the core's loop over ranges, which is the same machine code in L1 and on the host.

    The ranges are spread over `space` bytes of IOVA, so the bitmap fits in the CPU's cache, or each
    bit lies in a cache line of its own.
    """
    bits = np.zeros(_BYTES, dtype=np.uint8)
    bits[:] = 0  # fault the pages in
    iovas = np.arange(_RANGES, dtype=np.uint64) * np.uint64(space // _RANGES)
    return _least(lambda: _core.set_ranges(bits, 0, _SPACE - 1, 12, iovas, 1, False))


def _filled() -> int:
    bits = np.zeros(_BYTES // 8, dtype=np.uint64)
    bits[:] = 0
    return _least(lambda: bits.fill(1))
