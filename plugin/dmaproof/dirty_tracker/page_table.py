"""An I/O page table with dirty bits in its entries: the tracker of IOMMUs.

When an IOMMU translates a device's write, it sets the dirty bit of the entry that maps the page. A
query for dirty pages walks the table, reports every entry with the bit set, with the size that the
entry maps, and clears the bit. So such hardware reports no less than an entry: a 2 MiB entry
reports 2 MiB for one byte. The kernel's counterpart is `read_and_clear_dirty` of its IOMMU drivers,
called for iommufd's IOMMU_HWPT_GET_DIRTY_BITMAP.

The table is a radix tree with nodes of 512 64-bit entries, in the same bits as in RAM. A node is a
4 KiB row of one array, and its address is the byte of the array at which it begins. `_core` walks
the table as the hardware (marking) and as the driver (collecting). Vendors differ in the bits of an
entry (`EntryFormat`) and in the depth; each vendor has its own file in this package.

Mapping, splitting and merging are the driver's work. They must not run while another thread marks
pages; a real driver also has to flush the IOMMU's TLB before it does them.
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
    """Return log2 of the bytes that one entry of a node at `level` maps; level 1 is the lowest."""
    return _SHIFT + _INDEX_BITS * (level - 1)


@dataclass(frozen=True)
class EntryFormat:
    """The bits of an entry.

    An entry is valid if any bit of `present` is set. The IOMMU sets `dirty`, and `address` holds
    the address to which the entry points. The bits of `kind` give the kind of an entry at level n:
    (n - 1) * `node` is a node of level n - 1, `leaf[n]` is a page, and `group` is a page larger
    than the level's own, which the entry shares with its neighbours (0: the format has no such
    pages).
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
    """The layout of a table in memory, as `_core` needs it for a walk.

    `root` is the byte of the memory at which the root node begins, and `levels` the table's depth
    (1 to 6). `EntryFormat` explains the bits of an entry.
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
    """A page table of the format `form`, with pages of `page_sizes` bytes (powers of two).

    It maps each IOVA to itself, with the largest page size that the alignment allows.

    Raises:
        TrackerError: the format does not have one of the page sizes.
    """

    def __init__(self, form: EntryFormat, page_sizes: Sequence[int] = (PAGE_BYTES,)) -> None:
        self._form = form
        self._page_sizes = tuple(sorted(page_sizes, reverse=True))
        for size in self._page_sizes:
            self._level_and_group(size)
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
        """A copy of the entries of all nodes that are not 0, in the bits of the format."""
        entries: NDArray[np.uint64] = self._nodes[self._nodes != 0]
        return entries

    def map(self, iova: int, length: int) -> None:
        """Map `length` bytes from `iova` on, with clean pages.

        Raises:
            TrackerError: none of the page sizes fits, or the range ends beyond the table.
        """
        self._map(iova, length, self._page_sizes)
        self._mapped.append(IovaRange(iova, length))

    def mark(self, iova: int, length: int) -> None:
        """Set the dirty bits as the IOMMU does when a device writes.

        Unmapped pages are ignored: hardware would refuse a write to them.
        """
        _core.mark_table(self._nodes, self._layout, iova, iova + length - 1)

    def collect(self, bitmap: IovaBitmap, iova: int, length: int, *, clear: bool) -> None:
        """Report the dirty pages of `length` bytes from `iova` on, clipped to these bytes.

        With `clear`, the dirty bit of a page is cleared only if the range contains the whole page.
        A page across an edge of the range is reported again later; otherwise the dirty data in its
        other part would be lost.
        """
        found = self._dirty(iova, length, clear=clear)
        bitmap.set_many(found[:, 0], found[:, 1])

    def resize(self, iova: int, length: int, size: int) -> None:
        """Map a range again with pages of `size`: a split or a merge while tracking.

        After a split every part of a dirty page is dirty. After a merge a page with a dirty part is
        dirty.

        Raises:
            TrackerError: the range is not wholly mapped, or contains only part of a page.
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
            raise TrackerError(
                f"IOVA {iova:#x} + {length:#x} does not consist of whole mapped pages"
            )
        self._level_and_group(size)
        dirty = self._dirty(iova, length, clear=False)
        self._unmap(0, self._form.levels, 0, iova, end)
        self._map(iova, length, (size,))
        for start, count in dirty.tolist():
            self.mark(start, count)

    def page_at(self, iova: int) -> IovaRange | None:
        """Return the page that contains `iova`, or None if `iova` is not mapped."""
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
        """Return the dirty (iova, length) runs, shape (runs, 2)."""
        pairs = _core.read_table(self._nodes, self._layout, iova, iova + length - 1, clear)
        return np.frombuffer(pairs, dtype=np.uint64).reshape(-1, 2)

    def _level_and_group(self, size: int) -> tuple[int, int]:
        """Return the level of the entries that map pages of `size`, and the entries per page."""
        if size >= 1 << _SHIFT and not size & (size - 1):
            for level in self._form.leaf:
                group = size >> _level_shift(level)
                if group == 1 or (1 < group < _ENTRIES and self._form.group):
                    return level, group
        raise TrackerError(f"this format of page table has no pages of {size:#x} bytes")

    def _map(self, iova: int, length: int, page_sizes: Sequence[int]) -> None:
        reach = 1 << min(64, _level_shift(self._form.levels + 1))
        if length < 1 or iova + length > reach:
            raise TrackerError(
                f"IOVA {iova:#x} + {length:#x} is empty or reaches beyond the table's {reach:#x}"
            )
        if (iova | length) % page_sizes[-1]:
            raise TrackerError(
                f"IOVA {iova:#x} + {length:#x} does not consist of whole pages of "
                f"{page_sizes[-1]:#x} bytes"
            )
        position, end = iova, iova + length
        while position < end:
            fits = [size for size in page_sizes if position % size == 0 and size <= end - position]
            stop = end // fits[0] * fits[0]
            for size in page_sizes:  # stop where a larger page can begin
                aligned = div_ceil(position, size) * size
                if position < aligned <= end - size:
                    stop = min(stop, aligned)
            position = self._map_within_node(position, stop, fits[0])

    def _map_within_node(self, iova: int, end: int, size: int) -> int:
        """Map pages of `size` up to the end of one node; return the IOVA after these pages."""
        level, group = self._level_and_group(size)
        shift = _level_shift(level)
        node = self._node_of(iova, level)
        first = iova >> shift & _ENTRIES - 1
        count = min(end - iova >> shift, _ENTRIES - first)
        pages = np.arange(count, dtype=np.uint64) // np.uint64(group) * np.uint64(size)
        entries = (pages + np.uint64(iova)) & np.uint64(self._form.address)
        if group > 1:  # the lowest zero bit of the address encodes the size
            entries |= np.uint64(size // 2 - (1 << _SHIFT) | self._form.group)
        else:
            entries |= np.uint64(self._form.leaf[level])
        self._nodes[node, first : first + count] = entries | np.uint64(self._form.present)
        return iova + (count << shift)

    def _node_of(self, iova: int, level: int) -> int:
        """Return the node at `level` that has the entry of `iova`; make it if it is missing."""
        form, node = self._form, 0
        for above in range(form.levels, level, -1):
            index = iova >> _level_shift(above) & _ENTRIES - 1
            entry = int(self._nodes[node, index])
            if entry & form.present:
                if entry & form.kind != (above - 1) * form.node:
                    raise TrackerError(f"IOVA {iova:#x} is already mapped")
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
        """Remove the entries of whole pages below `node`, and nodes that become empty."""
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
    """A dirty tracker that uses a `PageTable`; subclasses set the format in `form`."""

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
            raise TrackerError("the IOMMU's page table is not tracking: call start first")
        return self._table

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        if self._table is not None:
            raise TrackerError("the IOMMU's page table is already tracking: call stop first")
        table = PageTable(self.form, self._page_sizes)
        for iova, length in combine_ranges(ranges, len(ranges)):
            table.map(iova, length)
        self._table = table
        return min(self._page_sizes)  # the table's entries determine the size, not the caller

    def stop(self) -> None:
        self._table = None

    def dma(self, iova: int, length: int) -> None:
        if self._table is not None:
            self._table.mark(iova, length)

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        self.table.collect(bitmap, iova, length, clear=True)

    def read(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report without clearing dirty bits (IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR)."""
        self.table.collect(bitmap, iova, length, clear=False)
