"""vhost-net on a tap: what this process sends on the tap, the device writes to the receive ring."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Self

from ...host.tap_interface import TUN, bring_up, make_interface
from ..outcome import NotSupportedError, require
from .abi import FILE, Feature, Ioctl
from .device import VhostDevice, wait_until
from .memory import Comparison, GuestMemory
from .ring import Ring

PATH: Final = "/dev/vhost-net"
HEADER_BYTES: Final = 12
"""The length of struct virtio_net_hdr_v1."""
ETHERNET_HEADER_BYTES: Final = 14
LARGEST_FRAME: Final = 9000
_RECEIVE: Final = 0
_TUNSETVNETHDRSZ: Final = 0x400454D8
"""From <linux/if_tun.h>."""
_NO_FILE: Final = -1


class Tap:
    """A tap of this process, and a socket that sends frames on it."""

    def __init__(self, *, header: bool) -> None:
        """Make the tap; `header` is whether the tap adds the header of virtio-net to a frame.

        Raises:
            NotSupportedError: the kernel has no taps.
        """
        try:
            self.fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise NotSupportedError(str(error)) from None
        interface = make_interface(self.fd, "vhostlog%d", header=header)
        if header:
            fcntl.ioctl(self.fd, _TUNSETVNETHDRSZ, struct.pack("=i", HEADER_BYTES))
        # The kernel's own frames would make the number of used chains unknown.
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6").write_text("1")
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        bring_up(interface, LARGEST_FRAME)
        self._socket.bind((interface, 0))

    def send(self, frame: bytes) -> None:
        """Send a frame, which waits in the tap until the device takes it."""
        self._socket.send(frame)

    def is_empty(self) -> bool:
        """Return whether no frame waits."""
        return not select.select([self.fd], [], [], 0)[0]

    def close(self) -> None:
        """Remove the tap."""
        self._socket.close()
        os.close(self.fd)


class NetDevice:
    """A vhost-net device with its receive ring and its tap.

    The device runs only in `receive`. What it writes, also when it starts, is compared there.
    """

    def __init__(
        self,
        memory: GuestMemory,
        ring: Ring,
        features: Iterable[Feature],
        *,
        logged: bool = True,
        timeout_s: float,
    ) -> None:
        """Open the device; `logged` is whether it logs the used ring."""
        features = set(features)
        self.memory = memory
        self.ring = ring
        self._mergeable = Feature.NET_MERGEABLE in features
        self._timeout_s = timeout_s
        self._waiting: deque[int] = deque()
        self._vhost = VhostDevice(PATH, memory, features)
        try:
            self._tap = Tap(header=Feature.NET_HEADER not in features)
        except BaseException:
            self._vhost.close()
            raise
        self._vhost.add_ring(_RECEIVE, ring, logged=logged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._vhost.close()
        self._tap.close()

    def send(self, frame: bytes) -> None:
        """Put a frame in the tap."""
        self._tap.send(frame)
        self._waiting.append(len(frame) + HEADER_BYTES)

    def receive(self) -> Comparison:
        """Run the device until it has used all chains that the waiting frames need.

        Raises:
            WaitTimeoutError: it has not within the timeout.
        """
        frames, chains = usage(self._waiting, self.ring.capacities, mergeable=self._mergeable)
        for _ in range(frames):
            self._waiting.popleft()

        comparison = self._run(
            lambda: self.ring.used() >= chains, f"used {chains} chains for {frames} frames"
        )
        require(self.ring.used() == chains, f"{self.ring.used()} chains used, expected {chains}")
        self.ring.reclaim()
        return comparison

    def discard(self) -> Comparison:
        """Run the device until the tap is empty; the frames must be too large for its chains."""
        comparison = self._run(self._tap.is_empty, "emptied the tap")
        require(self.ring.used() == 0, f"{self.ring.used()} chains used, expected none")
        return comparison

    def _run(self, done: Callable[[], bool], what: str) -> Comparison:
        self.memory.snapshot()
        self._vhost.request(Ioctl.NET_SET_BACKEND, FILE.pack(_RECEIVE, self._tap.fd))
        try:
            wait_until(done, what, self._timeout_s)
        finally:
            # This waits for the ring's mutex, which handle_rx() holds until it has logged all.
            self._vhost.request(Ioctl.NET_SET_BACKEND, FILE.pack(_RECEIVE, _NO_FILE))
        return self.memory.compare()


def usage(frames: Sequence[int], capacities: Sequence[int], *, mergeable: bool) -> tuple[int, int]:
    """Return how many frames fit in the chains, and how many chains they need.

    Args:
        frames: the lengths of the frames with their headers.
        capacities: the lengths of the chains.
        mergeable: whether a frame may use several chains.
    """
    taken = chains = 0
    for frame in frames:
        left, used = frame, chains
        while left > 0 and used < len(capacities) and (mergeable or used == chains):
            left -= capacities[used]
            used += 1
        if left > 0:
            break
        taken, chains = taken + 1, used
    return taken, chains
