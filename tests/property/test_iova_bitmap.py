"""The iterator against a set of page numbers: every operation, on every kind of memory.

The model has no words, windows or shifts: a page is in the set or not.
"""

from __future__ import annotations

import itertools
import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dmaproof.errors import BitmapError
from dmaproof.iova_bitmap import ADDRESS_SPACE, IovaBitmap
from dmaproof.units import div_ceil

GUARD = 24
"""Bytes around the bitmap that must stay unchanged."""
WINDOW_BYTES = mmap.PAGESIZE
"""The smallest window: one page of bitmap, 32768 bits."""
WINDOW_BITS = 8 * WINDOW_BYTES


@dataclass(frozen=True)
class Shape:
    """The range and the page size of a bitmap."""

    iova: int
    length: int
    page_size: int

    @property
    def last(self) -> int:
        return self.iova + self.length - 1

    @property
    def bits(self) -> int:
        return self.last // self.page_size - self.iova // self.page_size + 1

    @property
    def bytes(self) -> int:
        return div_ceil(self.bits, 8)


@st.composite
def shapes(draw: st.DrawFn, most_bits: int = 3 * WINDOW_BITS + 77) -> Shape:
    """Draw any page size, IOVA and length, often at the end of the address space."""
    shift = draw(st.sampled_from([0, 1, 7, 9, 12, 12, 12, 16, 21, 30, 47, 57, 58, 62, 63]))
    pages = draw(st.integers(1, min(most_bits, 1 << (64 - shift))))
    if draw(st.booleans()):
        pages = min(pages, draw(st.integers(1, 200)))
    page_size = 1 << shift
    first = draw(
        st.sampled_from([0, (1 << 64 - shift) - pages])
        | st.integers(0, max(0, (1 << 64 - shift) - pages))
    )
    head = draw(st.integers(0, page_size - 1)) if draw(st.booleans()) else 0
    tail = draw(st.integers(0, page_size - 1)) if draw(st.booleans()) else 0
    length = pages * page_size - head - tail
    if length < 1:
        head, length = 0, pages * page_size
    return Shape(first * page_size + head, length, page_size)


class Memory:
    """Memory for a bitmap with guard bytes around it, at any alignment."""

    def __init__(self, kind: str, size: int, offset: int) -> None:
        self._offset = GUARD + offset
        self._size = size
        total = self._offset + size + GUARD
        self._map: mmap.mmap | None = None
        self._fd = -1
        self.whole: Any
        if kind in ("fd", "mmap"):
            self._fd = os.memfd_create("bitmap")
            os.write(self._fd, b"\xa5" * total)
            self._map = mmap.mmap(self._fd, total)
            self.whole = self._map
        elif kind == "numpy":
            self.whole = np.full(total, 0xA5, dtype=np.uint8)
        else:
            self.whole = bytearray(b"\xa5" * total)
        self.whole[self._offset : self._offset + size] = bytes(size) if kind != "numpy" else 0
        piece = memoryview(self.whole)[self._offset : self._offset + size]
        self.data: Any = piece if kind != "fd" else self._fd
        self.keywords: dict[str, int] = {}
        if kind == "fd":
            piece.release()
            self.keywords = {"offset": self._offset, "window_bytes": WINDOW_BYTES}

    def bits(self) -> set[int]:
        content = np.frombuffer(bytes(self.whole[self._offset :][: self._size]), dtype=np.uint8)
        return set(np.flatnonzero(np.unpackbits(content, bitorder="little")).tolist())

    def untouched_outside(self) -> bool:
        before = bytes(self.whole[: self._offset])
        after = bytes(self.whole[self._offset + self._size :])
        return set(before) == set(after) == {0xA5}

    def close(self) -> None:
        if isinstance(self.data, memoryview):
            self.data.release()
        if self._map is not None:
            self._map.close()
            os.close(self._fd)


@st.composite
def ranges_in(draw: st.DrawFn, shape: Shape) -> tuple[int, int]:
    """Draw a range inside `shape`: short, long, or touching an edge."""
    start = draw(
        st.sampled_from([shape.iova, shape.last])
        | st.integers(shape.iova, shape.last)
        | st.integers(0, shape.bits * shape.page_size // (WINDOW_BITS * shape.page_size)).map(
            lambda window: min(
                max(
                    (shape.iova // shape.page_size + window * WINDOW_BITS) * shape.page_size,
                    shape.iova,
                ),
                shape.last,
            )
        )
    )
    room = shape.last - start + 1
    length = draw(
        st.sampled_from([1, room, min(room, shape.page_size), min(room, shape.page_size + 1)])
        | st.integers(1, room)
        | st.integers(1, min(room, 200 * shape.page_size))
    )
    return start, length


class BitmapMachine(RuleBasedStateMachine):
    """A bitmap that is set and read in any order; the model is a set of bit numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | None = None
        self.bitmap: IovaBitmap

    @initialize(
        shape=shapes(),
        kind=st.sampled_from(["bytearray", "numpy", "mmap", "fd"]),
        offset=st.integers(0, 8192) | st.integers(0, 1024).map(lambda word: 8 * word),
        whole_words=st.booleans(),
        shared=st.booleans(),
    )
    def open(self, shape: Shape, kind: str, offset: int, whole_words: bool, shared: bool) -> None:
        self.shape = shape
        self.model: set[int] = set()
        self.ranges_told = 0
        size = div_ceil(shape.bytes, 8) * 8 if whole_words else shape.bytes
        self.memory = Memory(kind, size, offset)
        self.bitmap = IovaBitmap(
            shape.iova,
            shape.length,
            shape.page_size,
            self.memory.data,
            shared=shared,
            **self.memory.keywords,
        )

    def add(self, start: int, length: int) -> None:
        page_size, origin = self.shape.page_size, self.shape.iova // self.shape.page_size
        first, last = start // page_size, (start + length - 1) // page_size
        self.model |= set(range(first - origin, last - origin + 1))
        self.ranges_told += 1

    @rule(data=st.data())
    def set(self, data: st.DataObject) -> None:
        start, length = data.draw(ranges_in(self.shape))
        self.bitmap.set(start, length)
        self.add(start, length)

    @rule(data=st.data())
    def set_many(self, data: st.DataObject) -> None:
        fitting = ranges_in(self.shape).filter(lambda piece: piece[1] < ADDRESS_SPACE)
        ranges = data.draw(st.lists(fitting, max_size=20))
        iovas, lengths = np.array(ranges, dtype=np.uint64).reshape(-1, 2).T
        self.bitmap.set_many(iovas, lengths)
        for start, length in ranges:
            self.add(start, length)

    @rule(data=st.data())
    def set_many_pages(self, data: st.DataObject) -> None:
        """Set a list of single pages, as hardware writes it: crowded, or anywhere."""
        page_size = self.shape.page_size
        first = div_ceil(self.shape.iova, page_size)
        whole = (self.shape.iova + self.shape.length) // page_size - first
        if whole < 1:
            return
        pages = data.draw(st.lists(st.integers(0, whole - 1), max_size=60))
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, whole - 1))
            pages += range(start, min(whole, start + 70))
        iovas = [(first + page) * page_size for page in pages]
        self.bitmap.set_many(iovas, page_size)
        for iova in iovas:
            self.add(iova, page_size)

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """Check that a range which is empty or not wholly inside sets no bit of any list."""
        good = data.draw(st.lists(ranges_in(self.shape), max_size=3))
        outside = [(self.shape.iova, 0), (self.shape.last, 2), (self.shape.last, ADDRESS_SPACE)]
        outside += [(self.shape.iova, self.shape.length + 1)]
        outside += [(self.shape.iova - 1, 1)] if self.shape.iova else []
        outside += [(self.shape.last + 1, 1)] if self.shape.last < ADDRESS_SPACE - 1 else []
        bad = data.draw(st.sampled_from(outside))
        with pytest.raises(BitmapError):
            self.bitmap.set(*bad)
        if max(bad) < ADDRESS_SPACE and all(length < ADDRESS_SPACE for _, length in good):
            rows = np.array([*good, bad], dtype=np.uint64)
            with pytest.raises(BitmapError, match=f"range {len(good)} "):
                self.bitmap.set_many(rows[:, 0], rows[:, 1])

    @rule()
    def read_back(self) -> None:
        page_size, origin = self.shape.page_size, self.shape.iova // self.shape.page_size
        found: set[int] = set()
        end = -1
        for start, length in self.bitmap.ranges():
            assert start > end, "not in order, or not merged"
            assert start >= self.shape.iova
            end = start + length
            assert end - 1 <= self.shape.last
            found |= set(range(start // page_size - origin, (end - 1) // page_size - origin + 1))
        assert found == self.model
        assert self.bitmap.count() == len(self.model)

    @rule()
    def windows_tile_the_range(self) -> None:
        windows = list(self.bitmap.windows())
        assert windows[0].iova == self.shape.iova
        assert windows[-1].iova + windows[-1].length == self.shape.iova + self.shape.length
        for low, high in itertools.pairwise(windows):
            assert low.iova + low.length == high.iova

    @precondition(lambda self: self.memory is not None)
    @invariant()
    def bits_are_the_models(self) -> None:
        assert self.memory is not None
        assert self.memory.bits() == self.model
        assert self.memory.untouched_outside()
        assert self.bitmap.stats.bits == len(self.model)
        assert self.bitmap.stats.ranges == self.ranges_told

    def teardown(self) -> None:
        if self.memory is not None:
            self.bitmap.close()
            self.memory.close()


TestBitmap = BitmapMachine.TestCase
TestBitmap.settings = settings(
    max_examples=150,
    stateful_step_count=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(
    iova=st.integers(-1, ADDRESS_SPACE),
    length=st.integers(-1, ADDRESS_SPACE + 1),
    page_size=st.integers(-1, 1 << 64) | st.integers(0, 64).map(lambda shift: 1 << shift),
    size=st.integers(0, 64),
)
def test_a_bitmap_is_created_exactly_if_its_arguments_are_valid(
    iova: int, length: int, page_size: int, size: int
) -> None:
    possible = (
        0 < page_size <= 1 << 63
        and page_size & (page_size - 1) == 0
        and iova >= 0
        and length > 0
        and iova + length <= ADDRESS_SPACE
        and Shape(iova, length, page_size).bytes <= size
    )
    if possible:
        IovaBitmap(iova, length, page_size, bytearray(size)).close()
    else:
        with pytest.raises(BitmapError):
            IovaBitmap(iova, length, page_size, bytearray(size))
