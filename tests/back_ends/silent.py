"""A third-party vhost-user back end that negotiates, but never sends anything to the guest.

Run with the path to listen on, and 'disk' (it completes no request) or 'net' (it receives
the guest's frames, and sends none).
"""

from __future__ import annotations

import sys
from unittest import mock

import unobserved
from dmaproof.vhost_user.session import Session


def main() -> int:
    """Print a line that a test can find in the log, then serve."""
    path, kind = sys.argv[1:]
    print("silent", flush=True)
    if kind == "net":  # dmaproof's device answers only frames that ask for packets
        return unobserved.serve(path, "--device", "net")
    with mock.patch.object(Session, "serve_rings", return_value=False):
        return unobserved.serve(path)


if __name__ == "__main__":
    sys.exit(main())
