"""A vhost-user back end as somebody else's would be that has a fault: our own device, unobserved.

Run with the path to listen on and the fault to plant.
"""

from __future__ import annotations

import os
import socket
import sys


def main() -> None:
    """Become the device; its control socket stays open, and nobody speaks on it."""
    path, fault = sys.argv[1:]
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.set_inheritable(True)
    ours.detach()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(theirs.detach())]
    os.execv(sys.executable, [*command, "--socket", f"theirs={path}", "--fault", fault])


if __name__ == "__main__":
    main()
