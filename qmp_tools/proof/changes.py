"""Explain the pages that changed on the destination while they arrived there.

In a postcopy migration the destination's guest can run before all pages have arrived. It and its
devices then change pages that the source's RAM is compared with. A page that differs is not lost if

- the devices of the destination wrote every byte that differs, as their journals show, or
- the guest has declared that it may write the page itself (guests/workload.h).

Nothing on the destination has written the other bytes that differ, so they are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Evidence, Slot
from dmaproof.units import PAGE_BYTES

from ..memory.ram import RamFile
from .attribution import WrittenPages, differing_bytes, slots_in

_NO_GPA: Final = np.uint64(1 << 62)
"""More than the number of any page."""


@dataclass(frozen=True)
class Changes:
    """The pages that changed on the destination before the comparison.

    Attributes:
        by_devices: pages that differ because the destination's devices wrote to them.
        by_guest: pages that differ and that the guest may write itself.
        not_compared: all pages that the guest may write itself, whether or not they differ.
    """

    by_devices: int = 0
    by_guest: int = 0
    not_compared: int = 0

    def __add__(self, other: Changes) -> Changes:
        return Changes(
            self.by_devices + other.by_devices,
            self.by_guest + other.by_guest,
            self.not_compared + other.not_compared,
        )


class GuestPages:
    """The pages that the guest may write itself, as it has declared them.

    Args:
        declared: ranges of page numbers (GPA).
        unused: the GPAs of pages in these ranges that the guest does not use.
    """

    def __init__(self, declared: Sequence[range], unused: Sequence[int] = ()) -> None:
        starts = np.array([pages.start for pages in declared], dtype=np.uint64)
        ends = np.array([pages.stop for pages in declared], dtype=np.uint64)
        order = np.argsort(starts, kind="stable")
        self._starts = starts[order]
        self._ends = np.maximum.accumulate(ends[order])
        self._unused = np.array(unused, dtype=np.uint64) // PAGE_BYTES

    def among(self, pages: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each page number (GPA) whether the guest may write the page itself."""
        if not len(self._starts):
            return np.zeros(len(pages), dtype=np.bool_)
        at = np.searchsorted(self._starts, pages, side="right") - 1
        inside: NDArray[np.bool_] = (at >= 0) & (pages < self._ends[at])
        return inside & ~np.isin(pages, self._unused)


class RunningDestination:
    """Knows what the guest and the devices of the destination wrote before the comparison.

    Args:
        evidence: the evidence of each device, of what it wrote to the destination's RAM.
        guest_pages: the pages that the guest may write itself.
    """

    def __init__(self, evidence: Sequence[Evidence], guest_pages: GuestPages) -> None:
        self._written = [(each.records, WrittenPages(each.records)) for each in evidence]
        self._guest_pages = guest_pages

    def may_have_written(self, pages: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each page number (GPA) whether a loss of the page could be hidden."""
        hidden = self._guest_pages.among(pages)
        for _, written in self._written:
            hidden |= np.isin(pages, written.pages)
        return hidden

    def explain(
        self,
        differing: NDArray[np.int64],
        source: RamFile,
        destination: RamFile,
        slots: Sequence[Slot],
    ) -> tuple[NDArray[np.int64], Changes]:
        """Return those of the `differing` pages that are lost, and figures of the others.

        `differing` are sorted page numbers in the RAM files, both of whose guests are paused.
        `slots` are the guest's memory slots, as the source's evidence has them.
        """
        gpa_pages = gpa_pages_of(source, slots)
        guests = self._guest_pages.among(gpa_pages)
        others = differing[~guests[differing]]
        lost = [
            page
            for page in others.tolist()
            if not self._explains(page, int(gpa_pages[page]), source, destination)
        ]
        changes = Changes(
            by_devices=len(others) - len(lost),
            by_guest=len(differing) - len(others),
            not_compared=int(guests.sum()),
        )
        return np.array(lost, dtype=np.int64), changes

    def _explains(self, page: int, gpa_page: int, source: RamFile, destination: RamFile) -> bool:
        differs = differing_bytes(page * PAGE_BYTES, source, destination)
        for records, written in self._written:
            for row in written.rows_of(gpa_page):
                start = int(records["gpa"][row]) - gpa_page * PAGE_BYTES
                differs[max(0, start) : max(0, start + int(records["length"][row]))] = False
        return not differs.any()


def gpa_pages_of(ram: RamFile, slots: Sequence[Slot]) -> NDArray[np.uint64]:
    """Return the page number (GPA) of each page of a RAM file."""
    pages = np.full(ram.pages, _NO_GPA)
    for slot in slots_in(ram, slots):
        first, count = slot.file_offset // PAGE_BYTES, slot.length // PAGE_BYTES
        pages[first : first + count] = np.arange(count, dtype=np.uint64) + slot.gpa // PAGE_BYTES
    return pages
