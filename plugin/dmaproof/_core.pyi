"""Atomics and memory-bandwidth loops over bitmaps; see ``core/``.

A bitmap is any buffer. Bit *n* is bit *n* % 8 of byte *n* // 8, which is the same as bit *n* % 64
of the little-endian 64-bit word *n* // 64. Every function checks its bounds before it writes
anything, and raises ValueError if they are wrong. All functions but `fence` release the GIL.
"""

import mmap
from typing import Any

from numpy.typing import NDArray

from .dirty_tracker.page_table import TableLayout

_Buffer = bytes | bytearray | memoryview | mmap.mmap | NDArray[Any]

def fence() -> None:
    """Issue a full memory barrier (C11 seq_cst)."""

def set_bits(data: _Buffer, first_bit: int, bits: int, shared: bool = True) -> int:
    """Set `bits` bits from `first_bit` on, atomically if `shared`; return how many were new."""

def set_ranges(
    data: _Buffer,
    iova: int,
    last: int,
    page_shift: int,
    iovas: NDArray[Any],
    lengths: NDArray[Any] | int,
    shared: bool,
) -> int:
    """Set the bit of every page that one of the ranges touches; return how many were new.

    The bitmap covers the bytes `iova` to `last`, both included. `iovas` and `lengths` are arrays of
    uint64; an int for `lengths` is the length of all ranges.
    """

def or_bits(
    into: _Buffer, into_bit: int, source: _Buffer, source_bit: int, bits: int, shared: bool = True
) -> int:
    """OR `bits` bits of `source` into `into`, atomically if `shared`; return how many were new."""

def or_pages(
    into: _Buffer,
    into_page: int,
    into_shift: int,
    source: _Buffer,
    source_page: int,
    source_shift: int,
    iova: int,
    last: int,
    shared: bool = True,
) -> int:
    """OR a bitmap into one with another page size; return how many bits were new.

    Bit 0 of each bitmap stands for the page with the number `…_page` and ``1 << …_shift`` bytes. A
    page of `into` is set if a set page of `source` touches it within the bytes `iova` to `last`,
    both included.
    """

def find_set(data: _Buffer, first_bit: int, bits: int) -> bytes:
    """Return the runs of set bits as pairs of uint64: start relative to `first_bit`, and length."""

def take_set(data: _Buffer, first_bit: int, bits: int) -> bytes:
    """Return the runs of set bits as `find_set` does, and clear the bits by atomic exchange."""

def count_bits(data: _Buffer, first_bit: int, bits: int) -> int:
    """Return how many of the bits are set."""

def mark_table(memory: _Buffer, layout: TableLayout, iova: int, last: int) -> None:
    """Set the dirty bits of a page table's entries that map the bytes `iova` to `last`."""

def read_table(memory: _Buffer, layout: TableLayout, iova: int, last: int, clear: bool) -> bytes:
    """Return the dirty (iova, length) runs, pairs of uint64, within the bytes `iova` to `last`.

    With `clear`, the dirty bits of pages that lie wholly inside are cleared.
    """

def differing_pages(a: _Buffer, b: _Buffer | None, page_size: int, differing: _Buffer) -> int:
    """Set the bit in `differing` of each page that differs in `a` and `b`; return their number.

    None for `b` stands for zeros.
    """
