"""A device's IOTLB: what it has learnt of the mappings in its guest's IOMMU.

Behind a virtual IOMMU an IOVA means nothing by itself. The device asks for what it does not know (a
*miss*), is told single mappings (an *update*), and has to forget them when the guest's driver takes
them away (an *invalidation*). So the same IOVA is one page now and another one later, and one page
may have several IOVAs at a time.

Dirty pages are remembered by IOVA, and must reach the log by GPA. Both ends meet here: the mappings
tell the collector where an IOVA leads *now*, so whoever takes one away has to harvest it first.

A tracker is started with ranges, and to start it anew takes time. So `ranges` are large pieces of
the address space, in which drivers map and unmap as they like; there are more of them only if a
mapping comes that lies elsewhere.

An IOTLB is bounded, in entries and in pieces. What does not fit in any more is the caller's to make
room for: what is forgotten can be asked for again.
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
"""The widest IOVA: what a page table of four levels translates."""

MOST_ENTRIES: Final = 1 << 14
"""64 MiB of single pages: more than the largest request of a device here."""
_PIECE_BYTES: Final = 256 << 20
_MOST_PIECES: Final = 64
_MOST_RANGES: Final = 8
"""As many as the trackers have that have the fewest: they would track all that lies between."""
_MISSES_AT_A_TIME: Final = 64


class Miss(NamedTuple):
    """The page at `iova` is not known, or not for this `access` (bits, `READ` and `WRITE`)."""

    iova: int
    access: int


class Entry(NamedTuple):
    """`length` bytes at `iova` are guest RAM at `gpa`, for this `access`."""

    iova: int
    gpa: int
    length: int
    access: int

    @property
    def end(self) -> int:
        """The first IOVA behind it."""
        return self.iova + self.length


class Iotlb:
    """The `Bus` of a device behind an IOMMU; it knows nothing at first.

    It holds up to `most_entries`.
    """

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self._most_entries = most_entries
        self._entries: list[Entry] = []
        """In the order of their IOVAs; no two overlap."""
        self._starts: list[int] = []
        self._pieces: set[int] = set()

    @property
    def mappings(self) -> list[IovaMapping]:
        """The mappings, where entries that continue one another are one."""
        return _merged(self._entries)

    @property
    def ranges(self) -> list[IovaRange]:
        return _ranges_of(self._pieces)

    def overlapping(self, iova: int, length: int) -> list[IovaMapping]:
        """The mappings of all entries of which a part lies in `length` bytes from `iova` on."""
        return _merged(self._entries[self._touched(iova, length)])

    def widened(self, entry: Entry) -> Entry:
        """`entry` with the access, too, that is known of the same mapping already.

        A front end may tell of no more access than it was asked for.
        """
        known = self._entries[self._touched(entry.iova, entry.length)]
        if len(known) == 1 and known[0][:3] == entry[:3]:
            return entry._replace(access=entry.access | known[0].access)
        return entry

    def knows(self, entry: Entry) -> bool:
        """Whether `entry` is there, just like that."""
        return self._entries[self._touched(entry.iova, entry.length)] == [entry]

    def has_room_for(self, entry: Entry) -> bool:
        """Whether `entry` fits in without anything else being forgotten."""
        pieces = self._pieces.union(_pieces_of(entry))
        return (
            len(self._entries) < self._most_entries
            and len(pieces) <= _MOST_PIECES
            and len(_ranges_of(pieces)) <= _MOST_RANGES
        )

    def add(self, entry: Entry) -> bool:
        """Learn a mapping that overlaps none; True if `ranges` have become more by it.

        Raises:
            MemoryAccessError: it is no run of whole pages, or beyond `ADDRESS_BITS`, or larger than
                what can be watched at a time.
        """
        pieces = _pieces_of(entry)
        if (
            (entry.iova | entry.gpa | entry.length) % PAGE_BYTES
            or entry.length == 0
            or entry.end > 1 << ADDRESS_BITS
            or len(pieces) > _MOST_PIECES
        ):
            raise MemoryAccessError(
                f"IOTLB entry IOVA {entry.iova:#x} + {entry.length:#x} → GPA {entry.gpa:#x}: whole "
                f"pages of {PAGE_BYTES} bytes are due, with {ADDRESS_BITS} bits of address and "
                f"{_MOST_PIECES * _PIECE_BYTES:#x} bytes at the most"
            )
        place = bisect_left(self._starts, entry.iova)
        self._entries.insert(place, entry)
        self._starts.insert(place, entry.iova)
        more = not self._pieces.issuperset(pieces)
        self._pieces.update(pieces)
        return more

    def remove(self, iova: int, length: int) -> None:
        """Forget every entry of which a part lies there."""
        touched = self._touched(iova, length)
        del self._entries[touched]
        del self._starts[touched]

    def clear(self) -> None:
        """Forget every entry, and the `ranges` too."""
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
        """Translate; each piece is of one entry.

        Raises:
            IotlbMissError: some byte is not known, or not for `access`.
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
        """Make sure of the ranges; the error names a bounded number of pages.

        Raises:
            MemoryAccessError: there are more pages than the IOTLB can hold, or some beyond
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
                f"a request touches {pages} pages, more than the IOTLB's {self._most_entries}"
            )
        missing = itertools.chain(
            (it for iova, length in readable for it in self._missing(iova, length, READ)),
            (it for iova, length in writable for it in self._missing(iova, length, WRITE)),
        )
        accesses: dict[int, int] = {}
        for page, access in itertools.islice(missing, _MISSES_AT_A_TIME):
            accesses[page] = accesses.get(page, 0) | access
        if accesses:
            raise IotlbMissError([Miss(*it) for it in accesses.items()])

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
        raise MemoryAccessError(f"IOVA {iova:#x} + {length:#x} is beyond {ADDRESS_BITS} bits")


def _pieces_of(entry: Entry) -> range:
    return range(entry.iova // _PIECE_BYTES, div_ceil(entry.end, _PIECE_BYTES))


def _ranges_of(pieces: Iterable[int]) -> list[IovaRange]:
    """The runs of them."""
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
