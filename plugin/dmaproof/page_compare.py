"""Compares two guests' RAM page by page, at the speed of memcmp, and leaves holes alone.

Guest RAM in a memfd has holes where the guest never touched it. Reading a hole through a mapping
would allocate it, so holes are found with SEEK_DATA and SEEK_HOLE and never read: two holes are
equal, and data against a hole is compared with zeros.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from .units import div_ceil

_PIECE_BYTES: Final = 256 << 20
_DIGESTED_AT_ONCE: Final = 1 << 20
"""Small enough for a processor's cache."""
_WEIGHTS_SEED: Final = 4096


class Extent(NamedTuple):
    """Bytes of an open file, from `offset` on."""

    fd: int
    offset: int = 0


def differing_pages(
    source: Extent, destination: Extent, length: int, page_size: int = mmap.PAGESIZE
) -> NDArray[np.int64]:
    """The numbers of the pages that differ, counted from the extents' starts, sorted.

    Both extents have `length` bytes, whole pages of `page_size` bytes, a multiple of the machine's,
    and start on one of the machine's. The result has shape (differences,).

    Raises:
        ValueError: `length`, `page_size` or an offset does not fit.
    """
    for extent in (source, destination):
        _check(extent, length, page_size)
    found: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    machine_page = mmap.PAGESIZE  # what is a hole and what is not is told by these
    for start, end, in_source, in_destination in _pieces(source, destination, length):
        extents = [source] * in_source + [destination] * in_destination
        bits = np.zeros(div_ceil((end - start) // machine_page, 8), dtype=np.uint8)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all of it is data: no hole is filled
        mappings = [
            mmap.mmap(fd, end - start, flags, mmap.PROT_READ, offset=offset + start)
            for fd, offset in extents
        ]
        try:
            other = mappings[1] if len(mappings) > 1 else None
            if _core.differing_pages(mappings[0], other, machine_page, bits):
                pages = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
                found.append((pages + start // machine_page) // (page_size // machine_page))
        finally:
            for mapping in mappings:
                mapping.close()
    return np.unique(np.concatenate(found))


def page_digests(extent: Extent, length: int, page_size: int = mmap.PAGESIZE) -> NDArray[np.uint64]:
    """A number for each page, which is another one when the page has changed; 0 for zeros.

    As `differing_pages`, it leaves holes alone. Two contents share a number by chance only, in less
    than one of 2**30 changes.

    Raises:
        ValueError: `length`, `page_size` or the offset does not fit.
    """
    _check(extent, length, page_size)
    digests = np.zeros(length // page_size, dtype=np.uint64)
    weights = np.random.default_rng(_WEIGHTS_SEED).integers(
        1 << 64, size=page_size // 8, dtype=np.uint64
    ) | np.uint64(1)
    for start, end, is_data in _runs(extent, length):
        if not is_data:
            continue
        for position in range(start, end, _DIGESTED_AT_ONCE):
            first = position // page_size  # a page may be partly a hole
            last = div_ceil(min(end, position + _DIGESTED_AT_ONCE), page_size)
            content = os.pread(
                extent.fd, (last - first) * page_size, extent.offset + first * page_size
            )
            words = np.frombuffer(content, dtype="<u8").reshape(-1, page_size // 8)
            # The sum alone would not see an even number of top bits change.
            digests[first:last] = (words ^ words >> np.uint64(32)) @ weights
    return digests


def _check(extent: Extent, length: int, page_size: int) -> None:
    if page_size < 1 or page_size % mmap.PAGESIZE or length % page_size:
        raise ValueError(f"{length} bytes are no whole pages of {page_size} bytes")
    if extent.offset % mmap.PAGESIZE:
        raise ValueError(f"offset {extent.offset:#x} is not on a page of the machine")


def _pieces(
    source: Extent, destination: Extent, length: int
) -> Iterator[tuple[int, int, bool, bool]]:
    """The (start, end, source has data, destination has data) pieces in which one of them has."""
    source_runs, destination_runs = _runs(source, length), _runs(destination, length)
    source_end = destination_end = position = 0
    in_source = in_destination = False
    while position < length:
        if source_end == position:
            _, source_end, in_source = next(source_runs)
        if destination_end == position:
            _, destination_end, in_destination = next(destination_runs)
        end = min(source_end, destination_end, position + _PIECE_BYTES)
        if in_source or in_destination:
            yield position, end, in_source, in_destination
        position = end


def _runs(extent: Extent, length: int) -> Iterator[tuple[int, int, bool]]:
    """The (start, end, is data) runs of data and of holes, in order.

    A run's end is looked for once: on its way to a hole, SEEK_HOLE walks through all data, which
    takes tens of milliseconds in some gigabytes of a memfd.
    """
    start = 0
    while start < length:
        is_data, end = _data_at(extent, start, length)
        yield start, end, is_data
        start = end


def _data_at(extent: Extent, position: int, length: int) -> tuple[bool, int]:
    """Whether there is data at `position`, and up to where (whole pages) that holds."""
    fd, offset = extent
    try:
        data = os.lseek(fd, offset + position, os.SEEK_DATA) - offset
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False, length  # nothing but a hole is left
    start = data // mmap.PAGESIZE * mmap.PAGESIZE
    if start > position:
        return False, min(start, length)
    hole = os.lseek(fd, offset + position, os.SEEK_HOLE) - offset
    hole = div_ceil(hole, mmap.PAGESIZE) * mmap.PAGESIZE
    return True, min(hole, length)
