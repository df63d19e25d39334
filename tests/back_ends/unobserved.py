"""dmaproof's device as a third-party back end: dmaproof sees only its vhost-user socket."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dmaproof.dirty_tracker import EmulatedTracker, emulated_trackers
from dmaproof.vhost_user.__main__ import main


def serve(
    path: str,
    *options: str,
    trackers: Mapping[str, Callable[[], EmulatedTracker]] | None = None,
    tracker: str = "iommu",
    **session: Any,
) -> int:
    """Listen at `path` with `options` of ``python -m dmaproof.vhost_user``; return the exit code.

    The other end of its control socket stays open, but is never used.
    """
    unused_end, control = socket.socketpair()
    sys.argv[1:] = ["--control", str(control.detach()), "--socket", f"guest={path}", *options]
    with unused_end:
        return main(trackers or emulated_trackers(), tracker, **session)
