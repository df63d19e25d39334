"""Tell pages that QEMU may skip, because the guest says that they are free, from lost pages.

With free-page-hint (virtio-balloon) the guest names free pages while QEMU migrates, and QEMU clears
their dirty bits (qemu_guest_free_page_hint). Such a page may differ at the destination. QEMU does
not report which pages it has skipped. dmaproof therefore compares the pages that cannot be free:

- the pages that only the device writes: the guest's program holds them, and declares all others
  (guests/workload.h);
- the pages that a device wrote while QEMU logged, such as rings: the guest's drivers hold them.

Any other page that differs is not counted as lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Evidence, Slot

from ..memory.ram import RamFile
from .attribution import WrittenPages
from .changes import GuestPages, gpa_pages_of


def without_free_pages(
    differing: NDArray[np.int64],
    source: RamFile,
    slots: Sequence[Slot],
    guest_pages: GuestPages,
    evidence: Sequence[Evidence],
) -> NDArray[np.int64]:
    """Return those of the `differing` pages of a RAM file that cannot be free.

    Args:
        differing: sorted page numbers in the RAM file of the source.
        source: the RAM file.
        slots: the guest's memory slots.
        guest_pages: the pages that the guest may write itself, so that they may be free.
        evidence: the evidence of each device, of what it wrote to the source's RAM.
    """
    pages = gpa_pages_of(source, slots)[differing]
    may_be_free = guest_pages.among(pages)
    for each in evidence:
        may_be_free &= ~np.isin(pages, WrittenPages(each.records).pages)
    return differing[~may_be_free]
