"""A third-party network back end that sends frames back, loses some of them, and adds others.

Run with the path to listen on, and optionally a fault to inject (one of `dmaproof.faults`).
"""

from __future__ import annotations

import sys
from typing import Final
from unittest import mock

import unobserved
from dmaproof.devices.echo import Echo
from dmaproof.dma import Dma
from dmaproof.vhost_user import __main__ as device_process
from dmaproof.virtqueue import DescriptorChain

_LOST_EVERY, _REPEATED_EVERY, _SHORT_EVERY, _LONG_EVERY, _SWAPPED_EVERY = 499, 601, 743, 997, 1201
"""One in this many of the guest's frames is lost, and so on."""
_ANNOUNCEMENT: Final = b"\xff" * 6 + bytes.fromhex("525400123456 8035") + bytes(46)
"""A frame of the kind that QEMU sends after a migration (RARP)."""
_LONGEST: Final = _ANNOUNCEMENT.ljust(1514, b"x")


class UnreliableNetwork(Echo):
    """A network whose frames may get lost, come twice, change places, or come from others."""

    def __init__(self) -> None:
        super().__init__()
        self._sent = 0

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        known = len(self._frames)
        written = super().process(chain, dma)
        if len(self._frames) > known:
            self._sent += 1
            self._disturb()
        return written

    def _disturb(self) -> None:
        if self._sent % _LOST_EVERY == 0:
            self._frames.pop()
        elif self._sent % _REPEATED_EVERY == 0:
            self._frames.append(self._frames[-1])
        elif self._sent % _SHORT_EVERY == 0:
            self._frames.appendleft(_ANNOUNCEMENT)
        elif self._sent % _LONG_EVERY == 0:
            self._frames.append(_LONGEST)
        elif self._sent % _SWAPPED_EVERY == 0:
            self._frames.rotate()


def main() -> int:
    """Serve the network of the command line."""
    path, *fault = sys.argv[1:]
    with mock.patch.object(device_process, "make_device", return_value=UnreliableNetwork()):
        options = ("--fault", *fault) if fault else ()
        return unobserved.serve(path, *options)


if __name__ == "__main__":
    sys.exit(main())
