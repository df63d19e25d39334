"""A third-party vhost-user back end that stops slowly, because its last harvest is slow.

Run with the path to listen on.
"""

from __future__ import annotations

import sys
import time

import unobserved
from dmaproof.dirty_tracker.amd_iommu import AmdIommu
from dmaproof.iova_bitmap import IovaBitmap

PAUSE_S = 0.5


class SlowTracker(AmdIommu):
    """A tracker that is read only when the device stops, and is slow then."""

    name = "slow"

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report after a pause."""
        time.sleep(PAUSE_S)
        super().read_and_clear(bitmap, iova, length)


if __name__ == "__main__":
    trackers = {"slow": SlowTracker}
    sys.exit(unobserved.serve(sys.argv[1], "--harvest", "final", trackers=trackers, tracker="slow"))
