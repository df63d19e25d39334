"""A third-party vhost-user back end that negotiates, but from which nothing comes to the guest.

Run with the path to listen on, and 'disk' (it completes no request) or 'net' (it takes the frames
that the guest sends, and sends none back).
"""

from __future__ import annotations

import sys
from unittest import mock

import unobserved
from dmaproof.vhost_user.session import Session


def main() -> int:
    """Serve, after a line that a test can look for in the log."""
    path, kind = sys.argv[1:]
    print("silent", flush=True)
    if kind == "net":  # our own answers only frames that ask for packets
        return unobserved.serve(path, "--device", "net")
    with mock.patch.object(Session, "serve_rings", return_value=False):
        return unobserved.serve(path)


if __name__ == "__main__":
    sys.exit(main())
