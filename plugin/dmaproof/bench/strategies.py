"""Three strategies of carrying reports into a bitmap, in C (``strategies.c``).

Only benchmarks need them. So the first call compiles them, which takes a fraction of a second, and
the installed package does not contain them in compiled form.

`bitmap` is writable memory of whole 4 KiB pages, aligned to 8 bytes. `bits` and `counts` are uint64
arrays: report i sets `counts[i]` bits from bit `bits[i]` on. Each function returns a `Sample`.

Each function raises ValueError if a report is empty or not wholly inside the bitmap (no bit was
set), and UntestableError if the machine has no C compiler.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import UntestableError
from ..units import PAGE_BYTES

Words = NDArray[Any]
Sample = tuple[float, float, int, int]
"""The seconds that a strategy took, the part of them that depends only on the bitmap's size, the
bitmap pages that a kernel would have pinned, and the bytes moved besides the bits."""

_SOURCE: Final = Path(__file__).with_suffix(".c")


class _Strategy(IntEnum):
    """``enum strategy``."""

    COPIED = 0
    IN_PIECES = 1
    ON_DEMAND = 2


class _Outcome(IntEnum):
    """``enum outcome``."""

    DONE = 0
    UNFIT = 1
    NO_MEMORY = 2


class _Cost(ctypes.Structure):
    """``struct cost``."""

    _fields_ = (
        ("seconds", ctypes.c_double),
        ("fixed", ctypes.c_double),
        ("pins", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


def copied(bitmap: Words, bits: Words, counts: Words) -> Sample:
    """Carry reports through a private bitmap of the whole range, which is merged as a whole."""
    return _carry(_Strategy.COPIED, bitmap, bits, counts)


def in_pieces(bitmap: Words, bits: Words, counts: Words) -> Sample:
    """Carry sorted reports that do not overlap, window by window over the whole range."""
    return _carry(_Strategy.IN_PIECES, bitmap, bits, counts)


def on_demand(bitmap: Words, bits: Words, counts: Words) -> Sample:
    """Carry reports in their order; the window follows them."""
    return _carry(_Strategy.ON_DEMAND, bitmap, bits, counts)


def _carry(strategy: _Strategy, bitmap: Words, bits: Words, counts: Words) -> Sample:
    words = all(array.dtype == np.uint64 and array.flags.c_contiguous for array in (bits, counts))
    if (
        not words
        or len(bits) != len(counts)
        or not bitmap.flags.carray
        or bitmap.nbytes % PAGE_BYTES
        or bitmap.ctypes.data % 8
    ):
        raise ValueError("strategies: expected a bitmap of whole pages and two arrays of uint64")
    cost = _Cost()
    addresses = bitmap.ctypes.data, bitmap.nbytes, bits.ctypes.data, counts.ctypes.data
    outcome = _library().carry(strategy, *addresses, len(bits), ctypes.byref(cost))
    if outcome == _Outcome.UNFIT:
        raise ValueError("strategies: a report is empty or not wholly inside the bitmap")
    if outcome == _Outcome.NO_MEMORY:
        raise MemoryError
    return cost.seconds, cost.fixed, cost.pins, cost.bytes


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="dmaproof-") as folder:
        target = Path(folder) / "strategies.so"
        # The same optimisation as meson's for the core, with which they are compared.
        command = ["cc", "-std=c11", "-O3", "-shared", "-fPIC", "-o", str(target), str(_SOURCE)]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        except FileNotFoundError:
            raise UntestableError(
                "the benchmark needs a C compiler to build its strategies: "
                "apt-get install gcc libc6-dev"
            ) from None
        except subprocess.CalledProcessError as error:
            raise UntestableError(f"{' '.join(command)} failed:\n{error.stderr}") from None
        library = ctypes.CDLL(str(target))
    library.carry.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_uint64, ctypes.POINTER(_Cost)),
    ]
    return library
