"""Open a tap, a network card of the host, which sends every frame back.

The kernel itself sends the frames back, if the host has tc and its kernel the modules. Otherwise a
packet socket in dmaproof's process does, which is slower.

The tap is in a network namespace of its own, so the configuration of the host does not change. Only
the file descriptors keep the tap and the namespace alive: both vanish with the last process that
has one. A child process makes them, because without root a new network namespace needs a new user
namespace, and only a process with a single thread may enter one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError

from .blocking_work import blocking_work
from .capabilities import CAP_SYS_ADMIN, is_capable
from .captured import run_captured
from .tap_interface import TUN, bring_up, make_interface

_logger = logging.getLogger(__name__)

_NAME: Final = "tap0"
_SEND_BACK: Final = (
    f"tc qdisc add dev {_NAME} ingress && "
    f"tc filter add dev {_NAME} ingress matchall action mirred egress redirect dev {_NAME}"
)
_SBIN: Final = ("/usr/sbin", "/sbin")
"""Where tc is; a user's PATH may lack them."""
_NO_IPV6: Final = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")

_FRAMES_AT_ONCE: Final = 64
_MOST_FRAME_BYTES: Final = 1 << 16

# Constants of <sched.h>, <linux/if_packet.h> and others.
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_ETH_P_ALL: Final = 0x0003
_SOL_PACKET: Final = 263
_PACKET_IGNORE_OUTGOING: Final = 23

_FAILURE: Final = struct.Struct("=ii")
"""A step of the child that failed, and its errno."""
_libc = ctypes.CDLL(None, use_errno=True)


class Tap:
    """A tap with the file descriptor `fd`; `echo` is None if the kernel sends the frames back."""

    def __init__(self, fd: int, echo: socket.socket | None) -> None:
        self.fd = fd
        self._echo = echo
        if echo is not None:
            echo.setblocking(False)
            asyncio.get_running_loop().add_reader(echo, self._send_back, echo)

    def _send_back(self, echo: socket.socket) -> None:
        with contextlib.suppress(OSError):  # no further frame, or no room: the frame is lost
            for _ in range(_FRAMES_AT_ONCE):
                echo.send(echo.recv(_MOST_FRAME_BYTES))

    def close(self) -> None:
        """Close the file descriptor; a QEMU that has inherited it keeps the tap."""
        os.close(self.fd)
        if self._echo is not None:
            asyncio.get_running_loop().remove_reader(self._echo)
            self._echo.close()


def open_tap(timeout_s: float) -> Tap:
    """Make a tap; the event loop must run.

    Raises:
        UntestableError: this host does not permit a tap.
    """
    environment = {**os.environ, "PATH": ":".join((os.environ.get("PATH", ""), *_SBIN))}
    own, of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with own, of_child, blocking_work():
        try:
            done = run_captured(
                ["sh", "-c", _SEND_BACK],
                timeout_s=timeout_s,
                env=environment,
                preexec_fn=_making_tap(of_child),
            )
        except subprocess.TimeoutExpired:
            raise WaitTimeoutError(
                f"tc has not configured a tap within {timeout_s:g} s; allow more time (--timeout)"
            ) from None
        own.setblocking(False)
        data, fds, _, _ = socket.recv_fds(own, _FAILURE.size, 2)
    step, number = _FAILURE.unpack(data)
    if number:
        raise UntestableError(_STEPS[step].format(why=os.strerror(number)))
    echo = socket.socket(fileno=fds[1])
    if done.returncode == 0:
        echo.close()
        return Tap(fds[0], None)
    _logger.info("dmaproof sends the frames back, because tc cannot: %s", done.stderr.strip())
    return Tap(fds[0], echo)


_STEPS: Final = (
    "a tap needs a network namespace of its own ({why}): allow user namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1), run dmaproof as root, or outside the container",
    f"{TUN}, of which dmaproof makes a tap, cannot be opened ({{why}}): load the module tun "
    "(modprobe tun), and let this user, or the container, use the device",
    "the kernel refuses to make a tap ({why}): let the container use network devices "
    "(CAP_NET_ADMIN)",
    "the kernel refuses a packet socket ({why}): load the module af_packet",
)
"""The error messages for the steps of the child."""


def _making_tap(answer: socket.socket) -> Callable[[], None]:
    """Return a function for the child, which makes the tap in a new namespace and sends it."""
    users = 0 if is_capable(CAP_SYS_ADMIN) else _CLONE_NEWUSER
    ids = os.geteuid(), os.getegid()

    def make() -> None:
        step = 0
        try:
            if _libc.unshare(_CLONE_NEWNET | users):
                raise OSError(ctypes.get_errno(), "unshare")
            if users:
                _become_root(*ids)
            with contextlib.suppress(OSError):  # else the kernel sends frames of its own
                _NO_IPV6.write_text("1")
            step = 1
            tap = os.open(TUN, os.O_RDWR)
            step = 2
            make_interface(tap, _NAME, header=True)
            bring_up(_NAME)
            step = 3
            echo = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            echo.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            echo.bind((_NAME, _ETH_P_ALL))
            socket.send_fds(answer, [_FAILURE.pack(0, 0)], [tap, echo.fileno()])
        except OSError as error:
            answer.send(_FAILURE.pack(step, error.errno or 0))
            os._exit(1)

    return make


def _become_root(user: int, group: int) -> None:
    """Become root in the new user namespace (user_namespaces(7))."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
