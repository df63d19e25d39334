"""Three ways of carrying reports into a bitmap, in C; see ``_strategies.c``.

`bitmap` is a writable buffer of whole 4 KiB pages, aligned to 8 bytes; `bits` and `counts` are
uint64 arrays: a report sets `counts[i]` bits from bit `bits[i]` on. Each returns the seconds that
it took, those of them that were spent for the bitmap's size alone, the bitmap pages that a kernel
would have pinned, and the bytes moved besides the bits.

Raises ValueError where a report is empty or not wholly inside; nothing was set.
"""

from typing import Any

from numpy.typing import NDArray

_Words = NDArray[Any]

def copied(bitmap: _Words, bits: _Words, counts: _Words) -> tuple[float, float, int, int]:
    """Through a private bitmap of the whole range, merged as a whole."""

def in_pieces(bitmap: _Words, bits: _Words, counts: _Words) -> tuple[float, float, int, int]:
    """Window by window over the whole range; the reports are sorted and do not overlap."""

def on_demand(bitmap: _Words, bits: _Words, counts: _Words) -> tuple[float, float, int, int]:
    """In the order of the reports, the window following them."""
