"""A device's IOTLB: its copy of some mappings of its guest's IOMMU.

Behind a virtual IOMMU only a mapping says where an IOVA leads. The device requests a mapping that
it does not have (a *miss*), receives single mappings (an *update*), and has to drop them when the
guest's driver removes them (an *invalidation*). So one IOVA may lead to different pages over time,
and one page may have several IOVAs at the same time.

Trackers record dirty pages by IOVA, and the log takes them by GPA. The mappings tell the collector
where an IOVA leads *now*, so a mapping has to be harvested before it is removed.

A tracker is started with ranges, and a restart takes time. So `ranges` are large pieces of the
address space, in which drivers may map and unmap freely. `ranges` grow only when a mapping outside
them arrives.

An IOTLB holds a bounded number of entries and of pieces. When it is full, the caller has to remove
entries; the device can request them again.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from .errors import IotlbMissError, MemoryAccessError
from .guest_memory import READ, WRITE, IovaMapping
from .iova_bitmap import IovaRange
from .units import PAGE_BYTES, div_ceil

ADDRESS_BITS: Final = 48
"""The width of an IOVA: a page table of four levels translates 48 bits."""

MOST_ENTRIES: Final = 1 << 14
"""64 MiB of single pages: more than the largest request of any dmaproof device."""
_PIECE_BYTES: Final = 256 << 20
_MOST_PIECES: Final = 64
_MOST_RANGES: Final = 8
"""The limit of the trackers with the fewest ranges; with more, they would track the gaps too."""
_MISSES_AT_A_TIME: Final = 64


class Miss(NamedTuple):
    """A page at `iova` that has no mapping for `access` (bits, `READ` and `WRITE`)."""

    iova: int
    access: int


class Entry(NamedTuple):
    """A mapping of `length` bytes at `iova` to guest RAM at `gpa`, for `access`."""

    iova: int
    gpa: int
    length: int
    access: int

    @property
    def end(self) -> int:
        """The first IOVA after the entry."""
        return self.iova + self.length


class Iotlb:
    """The `Bus` of a device behind an IOMMU; empty at first, with room for `most_entries`."""

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self._most_entries = most_entries
        self._entries: list[Entry] = []
        """Sorted by IOVA; no two entries overlap."""
        self._starts: list[int] = []
        self._pieces: set[int] = set()

    @property
    def mappings(self) -> list[IovaMapping]:
        """The mappings; entries that continue one another are merged."""
        return _merged(self._entries)

    @property
    def ranges(self) -> list[IovaRange]:
        return _ranges_of(self._pieces)

    def overlapping(self, iova: int, length: int) -> list[IovaMapping]:
        """Return the mappings of all entries that overlap `length` bytes from `iova` on."""
        return _merged(self._entries[self._touched(iova, length)])

    def with_known_access(self, entry: Entry) -> Entry:
        """Return `entry` with the access added that the IOTLB already has for the same mapping.

        A front end may answer a request with only the access that was requested.
        """
        known = self._entries[self._touched(entry.iova, entry.length)]
        if len(known) == 1 and known[0][:3] == entry[:3]:
            return entry._replace(access=entry.access | known[0].access)
        return entry

    def holds(self, entry: Entry) -> bool:
        """Return whether the IOTLB holds exactly `entry`."""
        return self._entries[self._touched(entry.iova, entry.length)] == [entry]

    def has_room_for(self, entry: Entry) -> bool:
        """Return whether `entry` fits without the removal of another entry."""
        pieces = self._pieces.union(_pieces_of(entry))
        return (
            len(self._entries) < self._most_entries
            and len(pieces) <= _MOST_PIECES
            and len(_ranges_of(pieces)) <= _MOST_RANGES
        )

    def add(self, entry: Entry) -> bool:
        """Add a mapping that overlaps no other; return whether `ranges` have grown.

        Raises:
            MemoryAccessError: the mapping does not consist of whole pages, lies beyond
                `ADDRESS_BITS`, or is larger than a tracker can watch at one time.
        """
        pieces = _pieces_of(entry)
        if (
            (entry.iova | entry.gpa | entry.length) % PAGE_BYTES
            or entry.length == 0
            or entry.end > 1 << ADDRESS_BITS
            or len(pieces) > _MOST_PIECES
        ):
            raise MemoryAccessError(
                f"IOTLB entry IOVA {entry.iova:#x} + {entry.length:#x} → GPA {entry.gpa:#x}: "
                f"expected whole pages of {PAGE_BYTES} bytes, an IOVA of {ADDRESS_BITS} bits and "
                f"at most {_MOST_PIECES * _PIECE_BYTES:#x} bytes"
            )
        place = bisect_left(self._starts, entry.iova)
        self._entries.insert(place, entry)
        self._starts.insert(place, entry.iova)
        more = not self._pieces.issuperset(pieces)
        self._pieces.update(pieces)
        return more

    def remove(self, iova: int, length: int) -> None:
        """Remove every entry that overlaps `length` bytes from `iova` on."""
        touched = self._touched(iova, length)
        del self._entries[touched]
        del self._starts[touched]

    def clear(self) -> None:
        """Remove every entry, and the `ranges` too."""
        self._entries.clear()
        self._starts.clear()
        self._pieces.clear()

    def _touched(self, iova: int, length: int) -> slice:
        first = bisect_right(self._starts, iova) - 1
        if first < 0 or self._entries[first].end <= iova:
            first += 1
        return slice(first, bisect_left(self._starts, iova + length))

    def _at(self, iova: int, access: int) -> Entry | None:
        index = bisect_right(self._starts, iova) - 1
        if index >= 0:
            entry = self._entries[index]
            if iova < entry.end and not access & ~entry.access:
                return entry
        return None

    def translate(self, iova: int, length: int, access: int = READ) -> list[tuple[int, int]]:
        """Translate a range of IOVAs into pieces that each lie in one entry.

        Raises:
            IotlbMissError: some byte has no mapping for `access`.
            MemoryAccessError: some byte is beyond `ADDRESS_BITS`, where nothing can be mapped.
        """
        _require_addressable(iova, length)
        pieces: list[tuple[int, int]] = []
        position, end = iova, iova + length
        while position < end:
            entry = self._at(position, access)
            if entry is None:
                raise IotlbMissError([Miss(position // PAGE_BYTES * PAGE_BYTES, access)])
            size = min(end, entry.end) - position
            pieces.append((entry.gpa + position - entry.iova, size))
            position += size
        return pieces

    def require(
        self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]
    ) -> None:
        """Check that the ranges are mapped; the error names a bounded number of pages.

        Raises:
            IotlbMissError: some page has no mapping.
            MemoryAccessError: the ranges have more pages than the IOTLB can hold, or lie beyond
                `ADDRESS_BITS`.
        """
        readable, writable = list(readable), list(writable)
        for iova, length in (*readable, *writable):
            _require_addressable(iova, length)
        pages = sum(
            div_ceil(iova + length, PAGE_BYTES) - iova // PAGE_BYTES
            for iova, length in (*readable, *writable)
        )
        if pages > self._most_entries:
            raise MemoryAccessError(
                f"a request touches {pages} pages, but the IOTLB holds only {self._most_entries}"
            )
        missing = itertools.chain(
            (miss for iova, length in readable for miss in self._missing(iova, length, READ)),
            (miss for iova, length in writable for miss in self._missing(iova, length, WRITE)),
        )
        accesses: dict[int, int] = {}
        for page, access in itertools.islice(missing, _MISSES_AT_A_TIME):
            accesses[page] = accesses.get(page, 0) | access
        if accesses:
            raise IotlbMissError([Miss(page, access) for page, access in accesses.items()])

    def _missing(self, iova: int, length: int, access: int) -> Iterator[Miss]:
        position, end = iova, iova + length
        while position < end:
            entry = self._at(position, access)
            if entry is None:
                page = position // PAGE_BYTES * PAGE_BYTES
                yield Miss(page, access)
                position = page + PAGE_BYTES
            else:
                position = entry.end


def _require_addressable(iova: int, length: int) -> None:
    if iova + length > 1 << ADDRESS_BITS:
        raise MemoryAccessError(
            f"IOVA {iova:#x} + {length:#x} reaches beyond the {ADDRESS_BITS} bits of an IOVA"
        )


def _pieces_of(entry: Entry) -> range:
    return range(entry.iova // _PIECE_BYTES, div_ceil(entry.end, _PIECE_BYTES))


def _ranges_of(pieces: Iterable[int]) -> list[IovaRange]:
    """Return the runs of consecutive pieces."""
    runs: list[IovaRange] = []
    for piece in sorted(pieces):
        start, length = piece * _PIECE_BYTES, _PIECE_BYTES
        if runs and sum(runs[-1]) == start:
            start, length = runs[-1].iova, runs.pop().length + length
        runs.append(IovaRange(start, length))
    return runs


def _merged(entries: Iterable[Entry]) -> list[IovaMapping]:
    merged: list[IovaMapping] = []
    for iova, gpa, length, _ in entries:
        if merged:
            before = merged[-1]
            if before.iova + before.length == iova and before.gpa + before.length == gpa:
                merged[-1] = IovaMapping(before.iova, before.gpa, before.length + length)
                continue
        merged.append(IovaMapping(iova, gpa, length))
    return merged
