"""Late DMA: what is written to the source's RAM after its guest has been paused for good.

Once a migration has completed, nobody may write there any more: the vCPUs are paused, QEMU has
stopped its devices, and the vhost-user specification has a device whose rings are all stopped write
to no guest memory. What still comes is missing on the destination. If it comes before both sides
are compared, the comparison shows it; what comes later shows only if the source's RAM is looked at
again. Its pages' digests of just before the comparison are enough for that.
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
"""For how long a third-party device is watched after its guest has been paused. Requests that a
stopped device still carries out have mostly ended by then."""


class PausedRam:
    """The RAM `files` of a paused guest; `written` tells which of their pages change afterwards."""

    def __init__(self, files: Sequence[RamFile]) -> None:
        self._digests = {ram.inode: _digests(ram) for ram in files}

    def written(self, ram: RamFile, slots: Sequence[Slot]) -> list[LostPage]:
        """The pages of one of the files that have changed; `slots` say where the guest has that."""
        offsets = np.flatnonzero(_digests(ram) != self._digests[ram.inode]) * PAGE_BYTES
        return [
            LostPage(offset, gpa_of(offset, slots), None, Blame.LATE_DMA)
            for offset in offsets.tolist()
        ]


def _digests(ram: RamFile) -> NDArray[np.uint64]:
    return page_digests(Extent(ram.fd), ram.length, PAGE_BYTES)
