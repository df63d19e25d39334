"""An I/O page table with dirty bits in its entries: the tracker of IOMMUs.

An IOMMU that translates a device's write sets the dirty bit of the entry that maps the page. Asking
for dirty pages is a walk over the table: every entry with the bit set is reported, with the size
that it maps, and the bit cleared. So the entry's size is the finest that such hardware can tell: a
2 MiB entry reports 2 MiB for one byte. The kernel's counterpart is `read_and_clear_dirty` of its
IOMMU drivers, behind iommufd's IOMMU_HWPT_GET_DIRTY_BITMAP.

The table is a radix tree of 512 64-bit entries a node, kept bit by bit as in RAM: a node is a 4 KiB
row of one array, and its address the byte at which it begins there. `_core` walks it, as the
hardware (marking) and as the driver (collecting). Vendors differ in the bits of an entry
(`EntryFormat`) and in the depth; each has a file of its own here.

Mapping, splitting and merging is the driver's work and is not to be done while another thread
marks: a real driver would have to flush the IOMMU's TLB in between, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import TrackerError
from ..iova_bitmap import IovaBitmap, IovaRange
from ..units import PAGE_BYTES, div_ceil
from .page_set import combine_ranges
from .tracker import EmulatedTracker

_SHIFT: Final = 12
_INDEX_BITS: Final = 9
_ENTRIES: Final = 1 << _INDEX_BITS
_NODE_BYTES: Final = 8 * _ENTRIES


def _level_shift(level: int) -> int:
    """log2 of the bytes that one entry of a node at `level` (the lowest: 1) stands for."""
    return _SHIFT + _INDEX_BITS * (level - 1)


@dataclass(frozen=True)
class EntryFormat:
    """The bits of an entry.

    Any bit of `present` makes it count; `dirty` is set by the IOMMU; `address` is where it points
    to. The bits of `kind` tell what it is: at level n, (n - 1) * `node` a node of level n - 1,
    `leaf[n]` memory, and `group` memory in a page larger than the level's own, which the entry
    shares with its neighbours (0: there is no such thing).
    """

    present: int
    dirty: int
    address: int
    kind: int
    node: int
    leaf: dict[int, int]
    group: int
    levels: int


class TableLayout(NamedTuple):
    """How `_core` walks a table that lies in memory.

    `root` is the byte of the memory at which the root node begins, `levels` the table's depth (1
    to 6); for the bits of an entry see `EntryFormat`.
    """

    root: int
    levels: int
    present: int
    dirty: int
    address: int
    kind: int
    node: int
    group: int


class PageTable:
    """A page table of `form` that maps with pages of `page_sizes` bytes (powers of two).

    Memory is mapped with the largest of the sizes that its alignment allows, each IOVA to itself.

    Raises:
        TrackerError: a page size is none that the format has.
    """

    def __init__(self, form: EntryFormat, page_sizes: Sequence[int] = (PAGE_BYTES,)) -> None:
        self._form = form
        self._page_sizes = tuple(sorted(page_sizes, reverse=True))
        for size in self._page_sizes:
            self._placing(size)
        self._layout = TableLayout(
            root=0,
            levels=form.levels,
            present=form.present,
            dirty=form.dirty,
            address=form.address,
            kind=form.kind,
            node=form.node,
            group=form.group,
        )
        self._nodes: NDArray[np.uint64] = np.zeros((1, _ENTRIES), dtype=np.uint64)
        self._used = 1
        self._free: list[int] = []
        self._mapped: list[IovaRange] = []

    @property
    def entries(self) -> NDArray[np.uint64]:
        """A copy of the entries of all nodes, in the format's bits, without those that are 0."""
        entries: NDArray[np.uint64] = self._nodes[self._nodes != 0]
        return entries

    def map(self, iova: int, length: int) -> None:
        """Map `length` bytes from `iova` on, clean.

        Raises:
            TrackerError: none of the page sizes fits, or the table does not reach so far.
        """
        self._map(iova, length, self._page_sizes)
        self._mapped.append(IovaRange(iova, length))

    def mark(self, iova: int, length: int) -> None:
        """Set the dirty bits as the IOMMU does when a device writes.

        Unmapped pages are left out: hardware would have refused the write.
        """
        _core.mark_table(self._nodes, self._layout, iova, iova + length - 1)

    def collect(self, bitmap: IovaBitmap, iova: int, length: int, *, clear: bool) -> None:
        """Report the dirty pages of `length` bytes from `iova` on, clipped to them.

        A dirty bit is cleared (with `clear`) only where the whole page was asked for; the rest of a
        page that lies across an edge would be lost otherwise, so it is reported again instead.
        """
        found = self._dirty(iova, length, clear=clear)
        bitmap.set_many(found[:, 0], found[:, 1])

    def resize(self, iova: int, length: int, size: int) -> None:
        """Map pages anew with pages of `size`: a split or a merge while tracking.

        Every part of a dirty page is dirty afterwards, and so is a page of which a part was.

        Raises:
            TrackerError: the range is not mapped whole, or holds a page only in part.
        """
        end = iova + length
        low, high = self.page_at(iova), self.page_at(end - 1)
        if (
            (iova | length) % size
            or low is None
            or high is None
            or low.iova != iova
            or high.iova + high.length != end
            or not any(start <= iova and end <= start + whole for start, whole in self._mapped)
        ):
            raise TrackerError(f"IOVA {iova:#x} + {length:#x} is no run of whole mapped pages")
        self._placing(size)
        dirty = self._dirty(iova, length, clear=False)
        self._unmap(0, self._form.levels, 0, iova, end)
        self._map(iova, length, (size,))
        for start, count in dirty.tolist():
            self.mark(start, count)

    def page_at(self, iova: int) -> IovaRange | None:
        """The page that holds `iova`; None if it is not mapped."""
        form, node = self._form, 0
        for level in range(form.levels, 0, -1):
            entry = int(self._nodes[node, iova >> _level_shift(level) & _ENTRIES - 1])
            if not entry & form.present:
                return None
            if level > 1 and entry & form.kind == (level - 1) * form.node:
                node = (entry & form.address) // _NODE_BYTES
                continue
            size = 1 << _level_shift(level)
            if form.group and entry & form.kind == form.group:
                pages = (entry & form.address) >> _SHIFT
                size = (~pages & pages + 1) << _SHIFT + 1
            return IovaRange(iova // size * size, size)
        raise AssertionError("an entry of level 1 points to a node")

    def _dirty(self, iova: int, length: int, *, clear: bool) -> NDArray[np.uint64]:
        """The dirty (iova, length) runs, shape (runs, 2)."""
        pairs = _core.read_table(self._nodes, self._layout, iova, iova + length - 1, clear)
        return np.frombuffer(pairs, dtype=np.uint64).reshape(-1, 2)

    def _placing(self, size: int) -> tuple[int, int]:
        """The level of the entries that map pages of `size`, and how many share one page."""
        if size >= 1 << _SHIFT and not size & (size - 1):
            for level in self._form.leaf:
                group = size >> _level_shift(level)
                if group == 1 or (1 < group < _ENTRIES and self._form.group):
                    return level, group
        raise TrackerError(f"this kind of page table has no pages of {size:#x} bytes")

    def _map(self, iova: int, length: int, page_sizes: Sequence[int]) -> None:
        reach = 1 << min(64, _level_shift(self._form.levels + 1))
        if length < 1 or iova + length > reach:
            raise TrackerError(
                f"IOVA {iova:#x} + {length:#x} is empty or beyond the table's {reach:#x}"
            )
        if (iova | length) % page_sizes[-1]:
            raise TrackerError(
                f"IOVA {iova:#x} + {length:#x} is no run of {page_sizes[-1]:#x}-byte pages"
            )
        position, end = iova, iova + length
        while position < end:
            fits = [size for size in page_sizes if position % size == 0 and size <= end - position]
            stop = end // fits[0] * fits[0]
            for size in page_sizes:  # a larger page may begin on the way
                aligned = div_ceil(position, size) * size
                if position < aligned <= end - size:
                    stop = min(stop, aligned)
            position = self._map_alike(position, stop, fits[0])

    def _map_alike(self, iova: int, end: int, size: int) -> int:
        """Map pages of `size` as far as one node reaches; returns the IOVA behind them."""
        level, group = self._placing(size)
        shift = _level_shift(level)
        node = self._node_of(iova, level)
        first = iova >> shift & _ENTRIES - 1
        count = min(end - iova >> shift, _ENTRIES - first)
        pages = np.arange(count, dtype=np.uint64) // np.uint64(group) * np.uint64(size)
        entries = (pages + np.uint64(iova)) & np.uint64(self._form.address)
        if group > 1:  # the lowest zero bit of the address tells the size
            entries |= np.uint64(size // 2 - (1 << _SHIFT) | self._form.group)
        else:
            entries |= np.uint64(self._form.leaf[level])
        self._nodes[node, first : first + count] = entries | np.uint64(self._form.present)
        return iova + (count << shift)

    def _node_of(self, iova: int, level: int) -> int:
        """The node at `level` that holds the entry of `iova`, made if it is not there."""
        form, node = self._form, 0
        for above in range(form.levels, level, -1):
            index = iova >> _level_shift(above) & _ENTRIES - 1
            entry = int(self._nodes[node, index])
            if entry & form.present:
                if entry & form.kind != (above - 1) * form.node:
                    raise TrackerError(f"IOVA {iova:#x} is mapped already")
                node = (entry & form.address) // _NODE_BYTES
                continue
            child = self._new_node()
            self._nodes[node, index] = child * _NODE_BYTES | form.present | (above - 1) * form.node
            node = child
        return node

    def _new_node(self) -> int:
        if self._free:
            return self._free.pop()
        if self._used == len(self._nodes):
            grown = np.zeros((2 * self._used, _ENTRIES), dtype=np.uint64)
            grown[: self._used] = self._nodes
            self._nodes = grown
        self._used += 1
        return self._used - 1

    def _unmap(self, node: int, level: int, base: int, iova: int, end: int) -> None:
        """Take away the entries of whole pages below `node`, and nodes that are empty then."""
        form, shift = self._form, _level_shift(level)
        low = max(0, iova - base >> shift)
        high = min(_ENTRIES, (end - 1 - base >> shift) + 1)
        entries = self._nodes[node, low:high]
        present = (entries & np.uint64(form.present)) != 0
        is_node = present & (entries & np.uint64(form.kind) == (level - 1) * form.node)
        if level == 1:
            is_node[:] = False
        entries[~is_node] = 0
        for index in np.flatnonzero(is_node).tolist():
            child = (int(entries[index]) & form.address) // _NODE_BYTES
            self._unmap(child, level - 1, base + (low + index << shift), iova, end)
            if not self._nodes[child].any():
                entries[index] = 0
                self._free.append(child)


class PageTableTracker(EmulatedTracker):
    """A `PageTable` as a dirty tracker; subclasses name the format."""

    form: EntryFormat

    def __init__(self, page_sizes: Sequence[int] = (PAGE_BYTES,)) -> None:
        self._page_sizes = page_sizes
        self._table: PageTable | None = None

    @property
    def table(self) -> PageTable:
        """The page table, while tracking.

        Raises:
            TrackerError: tracking is off.
        """
        if self._table is None:
            raise TrackerError("the IOMMU's page table does not track: call start first")
        return self._table

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        if self._table is not None:
            raise TrackerError("the IOMMU's page table tracks already")
        table = PageTable(self.form, self._page_sizes)
        for iova, length in combine_ranges(ranges, len(ranges)):
            table.map(iova, length)
        self._table = table
        return min(self._page_sizes)  # the entries decide, not the caller

    def stop(self) -> None:
        self._table = None

    def dma(self, iova: int, length: int) -> None:
        if self._table is not None:
            self._table.mark(iova, length)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        self.table.collect(bitmap, iova, length, clear=True)

    def read(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report without forgetting (iommufd: IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR)."""
        self.table.collect(bitmap, iova, length, clear=False)
