"""Intel VT-d's second-stage page table (VT-d specification, chapter 9.8, "Second-Stage Paging
Entries").

Entries have a dirty bit if the IOMMU supports SSADS. A page of 2 MiB or 1 GiB is an entry of level
2 or 3 with the page-size bit.
"""

from __future__ import annotations

from typing import ClassVar

from .page_table import EntryFormat, PageTableTracker

_READ_WRITE = 3
_PAGE_SIZE = 1 << 7


class IntelIommu(PageTableTracker):
    """Dirty bits in the entries of Intel's second-stage page table with four levels."""

    name: ClassVar[str] = "iommu-intel"
    form = EntryFormat(
        present=_READ_WRITE,
        dirty=1 << 9,
        address=(1 << 52) - (1 << 12),
        kind=_PAGE_SIZE,
        node=0,
        leaf={3: _PAGE_SIZE, 2: _PAGE_SIZE, 1: 0},
        group=0,
        levels=4,
    )
