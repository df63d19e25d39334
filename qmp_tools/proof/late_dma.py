"""Late DMA: writes to the source's RAM after its guest has been paused for the last time.

Once a migration has completed, nothing may write to the source's RAM: the vCPUs are paused, QEMU
has stopped its devices, and the vhost-user specification forbids a device whose rings are all
stopped to write to guest memory. A later write is missing on the destination. The comparison of
both sides detects a write that comes before it. To detect a write that comes after the comparison,
the digests of the source's pages from just before the comparison are computed again and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Slot
from dmaproof.page_compare import Extent, page_digests
from dmaproof.units import PAGE_BYTES

from ..memory.ram import RamFile
from ..migration.judgement import Blame
from .attribution import LostPage, gpa_of

SETTLE_S: Final = 4.0
"""The seconds for which a third-party device is watched after its guest has been paused. By then,
most requests that a stopped device still carries out have ended."""


class PausedRam:
    """The RAM `files` of a paused guest; `written` returns the pages that have changed since."""

    def __init__(self, files: Sequence[RamFile]) -> None:
        self._digests = {ram.inode: _digests(ram) for ram in files}

    def written(self, ram: RamFile, slots: Sequence[Slot]) -> list[LostPage]:
        """Return the pages of one of the files that have changed; `slots` map it to GPAs."""
        offsets = np.flatnonzero(_digests(ram) != self._digests[ram.inode]) * PAGE_BYTES
        return [
            LostPage(offset, gpa_of(offset, slots), None, Blame.LATE_DMA)
            for offset in offsets.tolist()
        ]


def _digests(ram: RamFile) -> NDArray[np.uint64]:
    return page_digests(Extent(ram.fd), ram.length, PAGE_BYTES)
