"""File descriptors of unusual kinds."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from typing import Final

from support.hostile.peer import Peer


def reopened(flags: int) -> Callable[[Peer], int]:
    return lambda peer: os.open(f"/proc/self/fd/{peer.ram.fd}", flags)


def sized(size: int, flags: int = 0) -> Callable[[Peer], int]:
    def make(peer: Peer) -> int:
        fd = os.memfd_create("hostile-odd", flags | os.MFD_CLOEXEC)
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        return fd

    return make


def _one_end_of_a_pipe(peer: Peer) -> int:
    ends = list(os.pipe())
    fd = ends.pop(peer.source.integer(0, 1))
    os.close(ends[0])
    return fd


def _epoll(peer: Peer) -> int:
    epoll = select.epoll()
    fd = os.dup(epoll.fileno())
    epoll.close()
    return fd


KINDS: Final[tuple[Callable[[Peer], int], ...]] = (
    lambda peer: os.dup(peer.events[peer.source.integer(0, 2)]),
    lambda peer: os.dup(peer.ram.fd),
    lambda peer: os.dup(peer.log.fd),
    lambda peer: os.dup(peer.socket.fileno()) if peer.socket.fileno() >= 0 else os.eventfd(0),
    reopened(os.O_RDONLY),
    reopened(os.O_PATH),
    sized(0),
    sized(1 << 24),
    sized(1 << 48),
    sized((1 << 63) - 1),
    sized(2 << 20, os.MFD_HUGETLB),
    _one_end_of_a_pipe,
    _epoll,
    lambda peer: os.open("/", os.O_RDONLY),
    lambda peer: os.open("/dev/zero", os.O_RDWR),
    lambda peer: os.open("/dev/null", os.O_RDWR),
)
