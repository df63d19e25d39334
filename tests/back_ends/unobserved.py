"""Our own device as a third-party back end: dmaproof gets nothing but its vhost-user socket."""

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
    """Listen at `path`, with `options` of ``python -m dmaproof.vhost_user``; returns its exit code.

    Nothing is ever said on its control socket, whose other end stays open.
    """
    ours, theirs = socket.socketpair()
    sys.argv[1:] = ["--control", str(theirs.detach()), "--socket", f"theirs={path}", *options]
    with ours:
        return main(trackers or emulated_trackers(), tracker, **session)
