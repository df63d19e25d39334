"""The C core against plain Python and numpy: merging, taking, counting and comparing."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dmaproof import _core
from dmaproof.page_compare import Extent, differing_pages
from dmaproof.units import div_ceil

BYTES = 80
"""The size of a small bitmap: a block of words with ragged ends on both sides."""


def as_bits(data: bytes | bytearray | NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(bytes(data), dtype=np.uint8), bitorder="little")


def runs_of(bits: NDArray[np.uint8]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], bits, [0])).astype(np.int8)))
    return [(int(low), int(high - low)) for low, high in zip(edges[::2], edges[1::2], strict=True)]


def pairs(data: bytes) -> list[tuple[int, int]]:
    return [(low, length) for low, length in np.frombuffer(data, np.uint64).reshape(-1, 2).tolist()]


bitmaps = st.builds(
    lambda seed, density, offset: (_random(seed, density, BYTES), offset),
    st.integers(0, 1 << 32),
    st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    st.integers(0, 9),
)
pieces = st.tuples(st.integers(0, 8 * 64), st.integers(0, 8 * 64))


def _random(seed: int, density: float, size: int) -> bytearray:
    bits = np.random.default_rng(seed).random(8 * size) < density
    return bytearray(np.packbits(bits, bitorder="little").tobytes())


def _piece(first: int, count: int, available: int) -> tuple[int, int]:
    first = min(first, available)
    return first, min(count, available - first)


@settings(max_examples=500)
@given(bitmaps, bitmaps, pieces, st.integers(0, 8 * 64), st.booleans())
def test_or_sets_exactly_the_bits_of_the_source(
    into: tuple[bytearray, int],
    source: tuple[bytearray, int],
    piece: tuple[int, int],
    from_bit: int,
    shared: bool,
) -> None:
    (target, target_at), (origin, origin_at) = into, source
    first, count = _piece(*piece, 8 * (BYTES - target_at))
    from_bit, count = _piece(from_bit, count, 8 * (BYTES - origin_at))
    expected = as_bits(target).copy()
    low = 8 * target_at + first
    incoming = as_bits(origin)[8 * origin_at + from_bit :][:count]
    new = int((incoming & ~expected[low : low + count] & 1).sum())
    expected[low : low + count] |= incoming
    added = _core.or_bits(
        memoryview(target)[target_at:],
        first,
        memoryview(origin)[origin_at:],
        from_bit,
        count,
        shared,
    )
    assert added == new
    assert (as_bits(target) == expected).all()


@settings(max_examples=300)
@given(bitmaps, pieces)
def test_find_take_and_count_agree_with_numpy(
    source: tuple[bytearray, int], piece: tuple[int, int]
) -> None:
    data, at = source
    first, count = _piece(*piece, 8 * (BYTES - at))
    view = memoryview(data)[at:]
    before = as_bits(data).copy()
    wanted = before[8 * at + first :][:count]
    assert pairs(_core.find_set(view, first, count)) == runs_of(wanted)
    assert _core.count_bits(view, first, count) == wanted.sum()
    assert (as_bits(data) == before).all()
    assert pairs(_core.take_set(view, first, count)) == runs_of(wanted)
    before[8 * at + first :][:count] = 0
    assert (as_bits(data) == before).all()


@settings(max_examples=300)
@given(
    seed=st.integers(0, 1 << 32),
    density=st.sampled_from([0.001, 0.3, 1.0]),
    shifts=st.tuples(st.integers(0, 10), st.integers(0, 10)),
    base=st.sampled_from([0, 1 << 40, (1 << 64) - (1 << 13)]),
    cut=st.tuples(st.integers(0, 1 << 12), st.integers(0, 1 << 12)),
    shared=st.booleans(),
)
def test_or_between_page_sizes_sets_every_touched_page(
    seed: int,
    density: float,
    shifts: tuple[int, int],
    base: int,
    cut: tuple[int, int],
    shared: bool,
) -> None:
    """The model works byte by byte: a set page of the source sets each target page it touches."""
    into_shift, from_shift = shifts
    length = 1 << 13
    source = _random(seed, density, max(1, (length >> from_shift) // 8))
    target = _random(seed + 1, 0.05, max(1, (length >> into_shift) // 8) + 1)
    iova, last = base + cut[0], base + length - 1 - cut[1]
    if iova > last:
        return
    dirty = np.repeat(as_bits(source)[: max(1, length >> from_shift)], 1 << from_shift)[:length]
    dirty[: cut[0]] = 0
    dirty[length - cut[1] :] = 0
    expected = as_bits(target).copy()
    touched: NDArray[np.bool_] = np.any(dirty.reshape(-1, 1 << into_shift), axis=1)
    new = int((touched & ~expected[: len(touched)].astype(bool)).sum())
    expected[: len(touched)] |= touched
    added = _core.or_pages(
        target,
        base >> into_shift,
        into_shift,
        source,
        base >> from_shift,
        from_shift,
        iova,
        last,
        shared,
    )
    assert added == new
    assert (as_bits(target) == expected).all()


def test_two_mebibytes_become_512_pages_and_back() -> None:
    fine, coarse = bytearray(128), bytearray(1)
    assert _core.or_pages(fine, 0, 12, b"\x02", 0, 21, 0, (4 << 20) - 1) == 512
    assert runs_of(as_bits(fine)) == [(512, 512)]
    assert _core.or_pages(coarse, 0, 21, fine, 0, 12, 0, (4 << 20) - 1) == 1
    assert coarse == b"\x02"


@pytest.mark.parametrize(
    "call",
    [
        lambda data: _core.set_bits(data, 0, 65),
        lambda data: _core.set_bits(data, 65, 0),
        lambda data: _core.set_bits(data, (1 << 64) - 1, 2),
        lambda data: _core.or_bits(data, 1, bytes(8), 0, 64),
        lambda data: _core.or_bits(data, 0, bytes(8), 1, 64),
        lambda data: _core.take_set(data, 0, 65),
        lambda data: _core.count_bits(data, 60, 5),
        lambda data: _core.or_pages(data, 1, 0, data, 0, 0, 0, 9),
        lambda data: _core.or_pages(data, 0, 0, data, 0, 0, 0, 64),
        lambda data: _core.or_pages(data, 0, 0, bytes(8), 0, 0, 0, (1 << 64) - 1),
        lambda data: _core.set_ranges(
            data, 0, (1 << 64) - 1, 0, np.full(1, 1 << 20, np.uint64), 1, True
        ),
        lambda data: _core.set_ranges(data, 0, 64, 0, np.zeros(1, np.uint64), 1, True),
        lambda data: _core.set_ranges(data, 0, 63, 64, np.zeros(1, np.uint64), 1, True),
        lambda data: _core.set_ranges(
            data, 0, 63, 0, np.zeros(2, np.uint64), np.ones(1, np.uint64), True
        ),
        lambda data: _core.differing_pages(bytes(5), bytes(5), 4, data),
        lambda data: _core.differing_pages(bytes(8), bytes(4), 4, data),
        lambda data: _core.differing_pages(bytes(65), None, 1, data),
    ],
)
def test_arguments_outside_the_memory_are_refused_and_write_nothing(call: object) -> None:
    data = bytearray(8)
    with pytest.raises((ValueError, OverflowError)):
        call(data)  # type: ignore[operator]
    assert data == bytes(8)


@settings(max_examples=100)
@given(
    page_bytes=st.sampled_from([1, 7, 64, 128, 256, 300, 4096]),
    pages=st.integers(1, 70),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), max_size=8),
    zeros=st.booleans(),
)
def test_a_comparison_finds_exactly_the_differing_pages(
    page_bytes: int, pages: int, changes: list[tuple[int, int]], zeros: bool
) -> None:
    size = page_bytes * pages
    left = bytearray(size) if zeros else bytearray(os.urandom(size))
    right = bytearray(left)
    for position, flip in changes:
        left[position % size] ^= flip
    differing = bytearray(div_ceil(pages, 8))
    expected = sorted(
        page
        for page in range(pages)
        if left[page * page_bytes :][:page_bytes] != right[page * page_bytes :][:page_bytes]
    )
    other = None if zeros else bytes(right)
    assert _core.differing_pages(bytes(left), other, page_bytes, differing) == len(expected)
    assert np.flatnonzero(as_bits(differing)).tolist() == expected


@settings(max_examples=100)
@given(
    data=st.lists(st.integers(0, 63), max_size=20),
    other_data=st.lists(st.integers(0, 63), max_size=20),
    same=st.lists(st.integers(0, 63), max_size=20),
    page_bytes=st.sampled_from([4096, 16384]),
)
def test_files_with_holes_compare_by_their_content(
    data: list[int], other_data: list[int], same: list[int], page_bytes: int
) -> None:
    """The files mix pages of data, pages of written zeros, and holes."""
    size = 64 * 4096
    contents = [bytearray(size), bytearray(size)]
    fds = [os.memfd_create("ram"), os.memfd_create("ram")]
    try:
        for fd, content, written in zip(fds, contents, (data, other_data), strict=True):
            os.ftruncate(fd, size)
            for page in [*written, *same]:
                piece = bytes(4096) if page % 3 == 0 else bytes([page]) * 4096
                if page in written and page % 5 == 0:
                    piece = os.urandom(4096)
                content[page * 4096 : (page + 1) * 4096] = piece
                os.pwrite(fd, piece, page * 4096)
        blocks = [os.fstat(fd).st_blocks for fd in fds]
        expected = [
            page
            for page in range(size // page_bytes)
            if contents[0][page * page_bytes :][:page_bytes]
            != contents[1][page * page_bytes :][:page_bytes]
        ]
        found = differing_pages(Extent(fds[0]), Extent(fds[1]), size, page_bytes)
        assert found.tolist() == expected
        assert [os.fstat(fd).st_blocks for fd in fds] == blocks, "a read has filled a hole"
    finally:
        for fd in fds:
            os.close(fd)


def test_files_of_partial_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="expected whole pages"):
        differing_pages(Extent(0), Extent(0), 4097)
