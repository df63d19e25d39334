"""An I/O page table with dirty bits in its entries: the tracker of IOMMUs.

An IOMMU that translates a device's write sets the dirty bit of the entry that maps the page. Asking
for dirty pages is a walk over the table: every entry with the bit set is reported, with the size
that it maps, and the bit cleared. So the entry's size is the finest that such hardware can tell: a
2 MiB entry reports 2 MiB for one byte. The kernel's counterpart is `read_and_clear_dirty` of its
IOMMU drivers, behind iommufd's IOMMU_HWPT_GET_DIRTY_BITMAP.

The table is a radix tree of 512 64-bit entries a node. Vendors differ in the bits of an entry
(`EntryFormat`) and in the depth; each has a file of its own here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange

_SHIFT: Final = 12
_INDEX_BITS: Final = 9
_ENTRIES: Final = 1 << _INDEX_BITS


def _level_shift(level: int) -> int:
    """log2 of the bytes that one entry of a node at `level` (leaves: 1) stands for."""
    return _SHIFT + _INDEX_BITS * (level - 1)


@dataclass(frozen=True)
class EntryFormat:
    """The bits of an entry: `present` in every one in use, `dirty` set by the IOMMU.

    `leaf[level]` are the bits that make an entry of that level map memory, `node[level]` those that
    make it point to a node of the level below. `contiguous` are the bits of an entry that shares
    one page larger than its own level's with its neighbours, 0 if the format has no such thing.
    """

    present: int
    dirty: int
    leaf: dict[int, int]
    node: dict[int, int]
    contiguous: int
    levels: int


class _Node:
    __slots__ = ("children", "entries", "run")

    def __init__(self) -> None:
        self.entries: NDArray[np.uint64] = np.zeros(_ENTRIES, dtype=np.uint64)
        self.run: NDArray[np.uint16] = np.ones(_ENTRIES, dtype=np.uint16)
        """How many neighbouring entries share the page of each (1: it has its own)."""
        self.children: dict[int, _Node] = {}


class PageTable:
    """A page table of `form` that maps with `page_sizes` (powers of two in bytes, 4096 the least).

    A range is mapped with the largest of the sizes that its alignment allows. The addresses mapped
    to play no part in tracking; entries hold none.

    Raises:
        TrackerError: a page size is none that the format has.
    """

    def __init__(self, form: EntryFormat, page_sizes: Sequence[int] = (4096,)) -> None:
        self.form = form
        self.page_sizes = tuple(sorted(page_sizes))
        for size in self.page_sizes:
            self._placing(size)
        if self.page_sizes[:1] != (1 << _SHIFT,):
            raise TrackerError("a page table without 4 KiB pages cannot map every range")
        self._root = _Node()
        self._dirty = np.uint64(form.dirty)
        self._leaf_node: _Node | None = None
        self._leaf_number = -1

    def _placing(self, size: int) -> tuple[int, int]:
        """The level of the entries that map pages of `size`, and how many share one page."""
        if size >= 1 << _SHIFT and not size & (size - 1):
            for level in sorted(self.form.leaf, reverse=True):
                run = size >> _level_shift(level)
                if run == 1 or (1 < run < _ENTRIES and self.form.contiguous):
                    return level, run
        raise TrackerError(f"this kind of page table has no pages of {size:#x} bytes")

    def map(self, iova: int, length: int) -> None:
        """Map `length` bytes from `iova` on, clean. Both are multiples of 4096.

        Raises:
            TrackerError: misaligned, or beyond what the table's levels reach.
        """
        reach = 1 << min(64, _level_shift(self.form.levels + 1))
        if iova % 4096 or length % 4096 or iova + length > reach:
            raise TrackerError(
                f"IOVA {iova:#x} + {length:#x} is misaligned or beyond the table's {reach:#x}"
            )
        position, end = iova, iova + length
        while position < end:
            size = next(
                size
                for size in reversed(self.page_sizes)
                if position % size == 0 and position + size <= end
            )
            position = self._map_alike(position, end, size)

    def _map_alike(self, position: int, end: int, size: int) -> int:
        """Map pages of `size` in one node as far as they go; returns the address behind them."""
        level, run = self._placing(size)
        node = self._node_of(position, level)
        first = position >> _level_shift(level) & _ENTRIES - 1
        larger = [other for other in self.page_sizes if other > size]
        stop = min(end, (position >> _level_shift(level + 1)) + 1 << _level_shift(level + 1))
        for other in larger:  # a larger page may begin on the way
            aligned = -(-position // other) * other
            if aligned + other <= end:
                stop = min(stop, max(aligned, position + size))
        count = (stop - position) // size * run
        kind = self.form.contiguous if run > 1 else self.form.leaf[level]
        node.entries[first : first + count] = self.form.present | kind
        node.run[first : first + count] = run
        return position + (count << _level_shift(level))

    def _node_of(self, iova: int, level: int) -> _Node:
        """The node at `level` that holds the entry of `iova`, made if it is not there."""
        node = self._root
        for depth in range(self.form.levels, level, -1):
            index = iova >> _level_shift(depth) & _ENTRIES - 1
            if index not in node.children:
                node.children[index] = _Node()
                node.entries[index] = self.form.present | self.form.node[depth]
            node = node.children[index]
        return node

    def _walk(self, iova: int) -> tuple[_Node, int, int] | None:
        """The node, index and level of the entry that translates `iova`; None if none does."""
        node = self._root
        for level in range(self.form.levels, 0, -1):
            index = iova >> _level_shift(level) & _ENTRIES - 1
            child = node.children.get(index)
            if child is None:
                return (node, index, level) if node.entries[index] else None
            node = child
        return None

    def page_at(self, iova: int) -> IovaRange | None:
        """The page that holds `iova`; None if it is not mapped."""
        found = self._walk(iova)
        if found is None:
            return None
        node, index, level = found
        size = int(node.run[index]) << _level_shift(level)
        return IovaRange(iova // size * size, size)

    def write(self, iova: int, length: int) -> None:
        """Set the dirty bits as the IOMMU does when a device writes; unmapped pages are left out
        (there the hardware would have refused the write)."""
        page, last = iova >> _SHIFT, iova + length - 1 >> _SHIFT
        while page <= last:
            if page >> _INDEX_BITS == self._leaf_number and self._leaf_node is not None:
                node = self._leaf_node
                if node.entries[page & _ENTRIES - 1]:
                    node.entries[page & _ENTRIES - 1] |= self._dirty
                page += 1
                continue
            found = self._walk(page << _SHIFT)
            if found is None:
                page += 1
                continue
            node, index, level = found
            if level == 1:
                self._leaf_node, self._leaf_number = node, page >> _INDEX_BITS
            node.entries[index] |= self._dirty
            page = (page >> _INDEX_BITS * (level - 1)) + 1 << _INDEX_BITS * (level - 1)

    def report(self, bitmap: IovaBitmap, iova: int, length: int, *, clear: bool = True) -> None:
        """Report the dirty pages of `length` bytes from `iova` on, clipped to them.

        A dirty bit is cleared (with `clear`) only where the whole page was asked for; the rest of a
        page that lies across an edge would be lost otherwise, so it is reported again instead.
        """
        found: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []
        self._collect(self._root, self.form.levels, 0, (iova, iova + length), clear, found)
        if found:
            starts, sizes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            bitmap.set_many(starts, sizes)

    def _collect(
        self,
        node: _Node,
        level: int,
        base: int,
        wanted: tuple[int, int],
        clear: bool,
        found: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]],
    ) -> None:
        shift = _level_shift(level)
        low = max(0, wanted[0] - base >> shift)
        high = min(_ENTRIES, (wanted[1] - 1 - base >> shift) + 1)
        for index in [index for index in node.children if low <= index < high]:
            child_base = base + (index << shift)
            self._collect(node.children[index], level - 1, child_base, wanted, clear, found)
        dirty = np.flatnonzero(node.entries[low:high] & self._dirty) + low
        if not len(dirty):
            return
        runs = node.run[dirty].astype(np.int64)
        if (runs > 1).any() or level > 1 or wanted[0] % 4096 or wanted[1] % 4096:
            pages = {
                (int(index) // int(run) * int(run), int(run))
                for index, run in zip(dirty, runs, strict=True)
            }
            self._collect_large(node, shift, base, wanted, clear, found, sorted(pages))
            return
        if clear:
            node.entries[dirty] &= ~self._dirty
        starts = dirty.astype(np.uint64) * np.uint64(1 << shift) + np.uint64(base)
        found.append((starts, np.full(len(dirty), 1 << shift, dtype=np.uint64)))

    def _collect_large(
        self,
        node: _Node,
        shift: int,
        base: int,
        wanted: tuple[int, int],
        clear: bool,
        found: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]],
        pages: list[tuple[int, int]],
    ) -> None:
        """Pages that may lie across the edges of what is wanted, one by one."""
        clipped = []
        for index, run in pages:
            start, end = base + (index << shift), base + (index + run << shift)
            if clear and wanted[0] <= start and end <= wanted[1]:
                node.entries[index : index + run] &= ~self._dirty
            low, high = max(start, wanted[0]), min(end, wanted[1])
            clipped.append((low, high - low))
        arrays = np.array(clipped, dtype=np.uint64)
        found.append((arrays[:, 0], arrays[:, 1]))

    def clear(self) -> None:
        """Clear every dirty bit."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            node.entries &= ~self._dirty
            nodes += node.children.values()

    def resize(self, iova: int, length: int, size: int) -> None:
        """Map whole pages anew with pages of `size`: a split or a merge while tracking.

        Every part of a dirty page is dirty afterwards, and so is a page of which a part was.

        Raises:
            TrackerError: the range is not mapped whole, or holds a page only in part.
        """
        self._placing(size)
        if iova % size or length % size:
            raise TrackerError(f"IOVA {iova:#x} + {length:#x} is no run of {size:#x}-byte pages")
        dirty: list[IovaRange] = []
        position = iova
        while position < iova + length:
            page = self.page_at(position)
            if page is None or page.iova != position or page.iova + page.length > iova + length:
                raise TrackerError(f"IOVA {iova:#x} + {length:#x} is not mapped in whole pages")
            node, index, _ = self._walk(position) or (self._root, 0, 0)
            if (node.entries[index : index + int(node.run[index])] & self._dirty).any():
                dirty.append(page)
            position += page.length
        self._unmap(iova, length)
        sizes, self.page_sizes = self.page_sizes, (size,)
        try:
            for start in range(iova, iova + length, size):
                self.map(start, size)
        finally:
            self.page_sizes = sizes
        for page in dirty:
            self.write(page.iova, page.length)

    def _unmap(self, iova: int, length: int) -> None:
        """Take away the entries of whole pages, and the nodes that only they needed."""
        self._leaf_node, self._leaf_number = None, -1
        position = iova
        while position < iova + length:
            found = self._walk(position)
            assert found is not None
            node, index, level = found
            run = int(node.run[index])
            node.entries[index : index + run] = 0
            node.run[index : index + run] = 1
            position += run << _level_shift(level)
        self._prune(self._root)

    def _prune(self, node: _Node) -> bool:
        """Drop nodes without entries below `node`; True if it has none itself."""
        for index in list(node.children):
            if self._prune(node.children[index]):
                del node.children[index]
                node.entries[index] = 0
        return not node.entries.any()


class PageTableTracker:
    """A `PageTable` as a dirty tracker; subclasses name the format."""

    form: EntryFormat

    def __init__(self, page_sizes: Sequence[int] = (4096,)) -> None:
        self._page_sizes = page_sizes
        self.table: PageTable | None = None

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """See `DirtyTracker.start`: map the ranges, all clean. The entries decide the page size."""
        if self.table is not None:
            raise TrackerError("the page table tracks already")
        table = PageTable(self.form, self._page_sizes)
        for iova, length in ranges:
            table.map(iova, length)
        self.table = table
        return max(self._page_sizes)

    def stop(self) -> None:
        """See `DirtyTracker.stop`."""
        self.table = None

    def dma(self, iova: int, length: int) -> None:
        """See `EmulatedTracker.dma`."""
        if self.table is not None:
            self.table.write(iova, length)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """See `DirtyTracker.read_and_clear`."""
        self._running().report(bitmap, iova, length)

    def read(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report without forgetting (iommufd: IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR)."""
        self._running().report(bitmap, iova, length, clear=False)

    def _running(self) -> PageTable:
        if self.table is None:
            raise TrackerError("the page table was asked before tracking was started")
        return self.table
