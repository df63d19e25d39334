"""The AMD IOMMU's page table, version 1 (AMD I/O Virtualization Technology specification, 2.2.3).

Entries have a dirty bit if the IOMMU supports HDSup. An entry's Next Level field gives its kind: 1
to 6 is a node of that level, 0 is a page of the level's own size, and 7 is a page of another size,
which several neighbouring entries share.
"""

from __future__ import annotations

from typing import ClassVar

from .page_table import EntryFormat, PageTableTracker

_NEXT_LEVEL_SHIFT = 9


class AmdIommu(PageTableTracker):
    """Dirty bits in the entries of an AMD page table, version 1, with six levels."""

    name: ClassVar[str] = "iommu"
    form = EntryFormat(
        present=1 << 0,
        dirty=1 << 6,
        address=(1 << 52) - (1 << 12),
        kind=7 << _NEXT_LEVEL_SHIFT,
        node=1 << _NEXT_LEVEL_SHIFT,
        leaf={3: 0, 2: 0, 1: 0},
        group=7 << _NEXT_LEVEL_SHIFT,
        levels=6,
    )
