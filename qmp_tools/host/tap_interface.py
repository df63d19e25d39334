"""Make a tap, a network interface whose frames a process reads and writes (tuntap.rst of Linux)."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

TUN: Final = Path("/dev/net/tun")

# Constants of <linux/if_tun.h>, <linux/sockios.h> and <net/if.h>.
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_UP: Final = 0x1
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_FLAGS: Final = struct.Struct("=16sh22x")
"""struct ifreq with ifr_flags."""
_MTU: Final = struct.Struct("=16si20x")
"""struct ifreq with ifr_mtu."""


def make_interface(tun: int, name: str, *, header: bool) -> str:
    """Make the file descriptor `tun`, of `TUN`, that of a new tap.

    Args:
        tun: the file descriptor.
        name: the name of the interface; the kernel replaces a ``%d`` in it by a number.
        header: whether each frame has the header of virtio-net before it.

    Returns:
        The name of the interface.

    Raises:
        OSError: the kernel refuses.
    """
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if header else 0)
    answer: bytes = fcntl.ioctl(tun, _TUNSETIFF, _FLAGS.pack(name.encode(), flags))
    return _FLAGS.unpack(answer)[0].rstrip(b"\0").decode()  # type: ignore[no-any-return]


def bring_up(interface: str, mtu: int | None = None) -> None:
    """Bring an interface up, with this MTU in bytes.

    Raises:
        OSError: the kernel refuses.
    """
    name = os.fsencode(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        if mtu is not None:
            fcntl.ioctl(any_socket, _SIOCSIFMTU, _MTU.pack(name, mtu))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _FLAGS.pack(name, _IFF_UP))
