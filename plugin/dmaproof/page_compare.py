"""Comparison of two guests' RAM page by page, at the speed of memcmp, without reading holes.

Guest RAM in a memfd has holes where the guest never touched it. A read of a hole through a mapping
would allocate its memory. So holes are found with SEEK_DATA and SEEK_HOLE and never read: two holes
are equal, and data opposite a hole is compared with zeros.

Pages are those of QEMU's dirty log, 4 KiB. A page of this host may be larger. Then several pages
share a hole, and an extent may begin inside a page of the host.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from .units import PAGE_BYTES, div_ceil

_PIECE_BYTES: Final = 256 << 20
_DIGESTED_AT_ONCE: Final = 1 << 20
"""Small enough for the cache of a processor."""
_WEIGHTS_SEED: Final = 4096


class Extent(NamedTuple):
    """Bytes of an open file, from `offset` on."""

    fd: int
    offset: int = 0


def differing_pages(
    source: Extent, destination: Extent, length: int, page_size: int = PAGE_BYTES
) -> NDArray[np.int64]:
    """Return the sorted numbers of the pages that differ, counted from the start of the extents.

    Both extents have `length` bytes, a multiple of `page_size`. `page_size` and the offsets of the
    extents are multiples of 4 KiB. The result has the shape (differences,).

    Raises:
        ValueError: `length`, `page_size` or an offset is not such a multiple.
    """
    for extent in (source, destination):
        _check(extent, length, page_size)
    found: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for start, end, in_source, in_destination in _pieces(source, destination, length):
        extents = [source] * in_source + [destination] * in_destination
        bits = np.zeros(div_ceil((end - start) // PAGE_BYTES, 8), dtype=np.uint8)
        with contextlib.ExitStack() as stack:
            data, *others = (
                stack.enter_context(_mapped(fd, offset + start, end - start))
                for fd, offset in extents
            )
            count = _core.differing_pages(data, others[0] if others else None, PAGE_BYTES, bits)
        if count:
            pages = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            found.append((pages + start // PAGE_BYTES) // (page_size // PAGE_BYTES))
    return np.unique(np.concatenate(found))


@contextlib.contextmanager
def _mapped(fd: int, offset: int, length: int) -> Iterator[memoryview]:
    """Map a run of data of a file; the mapping begins with the page of the host at `offset`."""
    skipped = offset % mmap.PAGESIZE
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # the run is all data: this fills no hole
    with (
        mmap.mmap(fd, skipped + length, flags, mmap.PROT_READ, offset=offset - skipped) as mapping,
        memoryview(mapping) as whole,
        whole[skipped:] as run,
    ):
        yield run


def page_digests(extent: Extent, length: int, page_size: int = PAGE_BYTES) -> NDArray[np.uint64]:
    """Return a number for each page that changes when the page changes; 0 for a page of zeros.

    Like `differing_pages`, the function does not read holes. By chance the number stays the same in
    less than one of 2**30 changes.

    Raises:
        ValueError: `length`, `page_size` or the offset is not a multiple that `differing_pages`
            accepts.
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
            # The sum alone would miss a change of the top bits of an even number of words.
            digests[first:last] = (words ^ words >> np.uint64(32)) @ weights
    return digests


def _check(extent: Extent, length: int, page_size: int) -> None:
    if page_size < 1 or page_size % PAGE_BYTES or length % page_size:
        raise ValueError(
            f"{length} bytes: expected whole pages of {page_size} bytes, a multiple of {PAGE_BYTES}"
        )
    if extent.offset % PAGE_BYTES:
        raise ValueError(
            f"offset {extent.offset:#x} is not a multiple of the page size {PAGE_BYTES}"
        )


def _pieces(
    source: Extent, destination: Extent, length: int
) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield (start, end, source has data, destination has data) of the pieces with any data."""
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
    """Yield the (start, end, is data) runs of data and of holes, in order.

    The end of each run is sought only once: SEEK_HOLE walks through all data up to the next hole,
    which takes tens of milliseconds in some gigabytes of a memfd.
    """
    start = 0
    while start < length:
        is_data, end = _data_at(extent, start, length)
        yield start, end, is_data
        start = end


def _data_at(extent: Extent, position: int, length: int) -> tuple[bool, int]:
    """Return whether `position` is data, and the end of that run of data or hole.

    Runs consist of whole pages. A page that is partly a hole counts as data.
    """
    fd, offset = extent
    try:
        data = os.lseek(fd, offset + position, os.SEEK_DATA) - offset
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False, length  # the rest is a hole
    start = data // PAGE_BYTES * PAGE_BYTES
    if start > position:
        return False, min(start, length)
    hole = os.lseek(fd, offset + position, os.SEEK_HOLE) - offset
    hole = div_ceil(hole, PAGE_BYTES) * PAGE_BYTES
    return True, min(hole, length)
