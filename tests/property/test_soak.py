"""Random operations on random bitmaps: DMAPROOF_SOAK operations, by default two hundred thousand.

The oracle is one byte for each page, and sums of differences. It shares neither code nor
representation with the iterator. A failure names the seed that repeats it.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof.iova_bitmap import IovaBitmap
from dmaproof.units import div_ceil

OPERATIONS = int(os.environ.get("DMAPROOF_SOAK", "200000"))
PER_ROUND = 20000


def pages_set(pages: int, first: NDArray[np.uint64], last: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which of `pages` pages the ranges cover, as sums of their begins and ends."""
    steps = np.zeros(pages + 1, dtype=np.int64)
    np.add.at(steps, first.astype(np.int64), 1)
    np.subtract.at(steps, last.astype(np.int64) + 1, 1)
    covered: NDArray[np.bool_] = np.cumsum(steps[:-1]) > 0
    return covered


def one_round(seed: int) -> int:
    """Run operations on one random bitmap; return their number."""
    rng = np.random.default_rng(seed)
    shift = int(rng.choice([0, 3, 9, 12, 12, 12, 16, 21, 30, 45]))
    pages = int(rng.integers(1, 400_000))
    page_size = 1 << shift
    most = (1 << 64 - shift) - pages
    first_page = most if rng.random() < 0.3 else int(rng.integers(0, most, dtype=np.uint64))
    head = int(rng.integers(0, page_size))
    iova, length = first_page * page_size + head, pages * page_size - head
    needed, offset = div_ceil(pages, 8), int(rng.integers(0, 5000))
    if rng.random() < 0.5:  # whole words, as in most bitmaps
        needed, offset = div_ceil(needed, 8) * 8, offset // 8 * 8

    fd = os.memfd_create("bitmap")
    try:
        os.ftruncate(fd, offset + needed + 8)
        with mmap.mmap(fd, offset + needed + 8) as whole:
            shared = bool(rng.integers(2))
            if rng.random() < 0.5:
                bitmap = IovaBitmap(
                    *(iova, length, page_size, fd),
                    offset=offset,
                    window_bytes=mmap.PAGESIZE,
                    shared=shared,
                )
            else:
                piece = memoryview(whole)[offset : offset + needed]
                bitmap = IovaBitmap(iova, length, page_size, piece, shared=shared)
                piece.release()
            with bitmap:
                expected = carry_out(rng, bitmap)
                assert bitmap.count() == expected.sum()
                check_ranges(bitmap, expected)
            content = np.frombuffer(bytes(whole), dtype=np.uint8)
    finally:
        os.close(fd)
    found = np.unpackbits(content[offset : offset + needed], bitorder="little")
    assert (found[:pages] == expected).all()
    assert not found[pages:].any()
    assert not content[:offset].any()
    assert not content[offset + needed :].any()
    return PER_ROUND


def carry_out(rng: np.random.Generator, bitmap: IovaBitmap) -> NDArray[np.bool_]:
    """Set ranges one by one, many at a time and page by page; return the pages to expect."""
    iova, length, shift = bitmap.iova, bitmap.length, bitmap.page_size.bit_length() - 1
    starts = rng.integers(0, length, PER_ROUND, dtype=np.uint64)
    longest = np.minimum(
        np.uint64(length) - starts,
        np.uint64(min(length, bitmap.page_size * int(rng.integers(1, 99)))),
    )
    lengths = rng.integers(np.uint64(1), longest, endpoint=True, dtype=np.uint64)
    iovas = starts + np.uint64(iova)
    if rng.random() < 0.3:  # whole pages, many of them neighbours
        pages = bitmap.bits - 2
        if pages > 0:
            ascending = (rng.integers(0, pages) + np.arange(PER_ROUND)) % pages + 1
            numbers = ascending.astype(np.uint64) + np.uint64(iova >> shift)
            iovas, lengths = numbers << np.uint64(shift), np.full_like(iovas, bitmap.page_size)
    one_by_one = int(rng.integers(0, PER_ROUND))
    for start, size in zip(iovas[:one_by_one].tolist(), lengths[:one_by_one].tolist(), strict=True):
        bitmap.set(start, size)
    bitmap.set_many(iovas[one_by_one:], lengths[one_by_one:])
    origin = np.uint64(iova >> shift)
    first = (iovas >> np.uint64(shift)) - origin
    last = (iovas + (lengths - np.uint64(1)) >> np.uint64(shift)) - origin
    return pages_set(bitmap.bits, first, last)


def check_ranges(bitmap: IovaBitmap, expected: NDArray[np.bool_]) -> None:
    found = np.zeros(len(expected), dtype=bool)
    for start, size in bitmap.ranges():
        first = start // bitmap.page_size - bitmap.iova // bitmap.page_size
        last = (start + size - 1) // bitmap.page_size - bitmap.iova // bitmap.page_size
        assert not found[max(0, first - 1) : last + 2].any(), "two ranges touch"
        found[first : last + 1] = True
    assert (found == expected).all()


@pytest.mark.timeout(3600)
def test_random_operations_set_and_report_the_expected_bits() -> None:
    seed = int(os.environ.get("DMAPROOF_SOAK_SEED", "1"))
    done = 0
    while done < OPERATIONS:
        try:
            done += one_round(seed)
        except AssertionError as error:
            raise AssertionError(f"with DMAPROOF_SOAK_SEED={seed}: {error}") from error
        seed += 1
