"""A vhost-user back end as somebody else's would be that takes long to stop: its last harvest does.

Run with the path to listen on.
"""

from __future__ import annotations

import socket
import sys
import time

from dmaproof.dirty_tracker.amd_iommu import AmdIommu
from dmaproof.iova_bitmap import IovaBitmap
from dmaproof.vhost_user.__main__ import main

PAUSE_S = 0.5


class SlowTracker(AmdIommu):
    """One that is asked only when the device stops, and takes its time then."""

    name = "slow"

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report late."""
        time.sleep(PAUSE_S)
        super().read_and_clear(bitmap, iova, length)


if __name__ == "__main__":
    ours, theirs = socket.socketpair()  # nobody speaks on its control socket
    path = sys.argv.pop()
    sys.argv += ["--control", str(theirs.detach()), "--socket", f"theirs={path}"]
    sys.argv += ["--harvest", "final"]
    sys.exit(main({"slow": SlowTracker}, "slow"))
