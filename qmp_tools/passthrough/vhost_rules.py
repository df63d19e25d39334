"""What the kernel's vhost-vsock logs, observed without QEMU.

This module is the front end of vhost-vsock, and also its guest: it gives the kernel some memory, a
dirty log and two rings, and connects to the guest's address. The kernel then writes a packet into
the guest's receive buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES

from .outcome import NotSupportedError, Rule, observe, require

_NODE: Final = Path("/dev/vhost-vsock")

# Requests and features of <linux/vhost.h>, <linux/vhost_types.h> and <linux/virtio_config.h>.
_SET_FEATURES: Final = 0x4008AF00
_SET_OWNER: Final = 0xAF01
_SET_MEM_TABLE: Final = 0x4008AF03
_SET_LOG_BASE: Final = 0x4008AF04
_SET_VRING_NUM: Final = 0x4008AF10
_SET_VRING_ADDR: Final = 0x4028AF11
_SET_VRING_BASE: Final = 0x4008AF12
_SET_VRING_KICK: Final = 0x4008AF20
_SET_VRING_CALL: Final = 0x4008AF21
_SET_GUEST_CID: Final = 0x4008AF60
_SET_RUNNING: Final = 0x4004AF61
_F_LOG_ALL: Final = 1 << 26
_F_VERSION_1: Final = 1 << 32
_VRING_F_LOG: Final = 1
_DESCRIPTOR_WRITE: Final = 2

_PAGES: Final = 64  # one word of the log
_RING_SIZE: Final = 8
_RECEIVE: Final = 0  # the queues of a virtio socket (virtio 1.2, section 5.10.2)
_TRANSMIT: Final = 1
_BUFFER_PAGE: Final = 16
_PACKET_HEADER_BYTES: Final = 44  # struct virtio_vsock_hdr
_CID: Final = 4242  # any address that no other guest has
_PORT: Final = 1
_TIMEOUT_MS: Final = 60_000


def _area_pages(queue: int) -> tuple[int, int, int]:
    """Return the pages of a ring's descriptors, available ring and used ring."""
    return 3 * queue + 1, 3 * queue + 2, 3 * queue + 3


class _Vsock:
    """A running vhost-vsock with an empty receive ring; `log` is the word of its dirty log."""

    def __init__(self, device: int, stack: contextlib.ExitStack) -> None:
        self.memory = mmap.mmap(-1, _PAGES * PAGE_BYTES)
        self.log: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._device = device
        self._request(_SET_OWNER, b"")
        region = struct.pack("=QQQQ", 0, len(self.memory), self._start, 0)
        self._request(_SET_MEM_TABLE, struct.pack("=II", 1, 0) + region)
        self._request(_SET_LOG_BASE, struct.pack("=Q", self.log.ctypes.data))
        self._request(_SET_FEATURES, struct.pack("=Q", _F_LOG_ALL | _F_VERSION_1))
        self.calls = [self._open_queue(queue, stack) for queue in (_RECEIVE, _TRANSMIT)]
        self._request(_SET_GUEST_CID, struct.pack("=Q", _CID))

    def _request(self, request: int, argument: bytes) -> None:
        fcntl.ioctl(self._device, request, argument)

    def _open_queue(self, queue: int, stack: contextlib.ExitStack) -> int:
        kick, call = (os.eventfd(0) for _ in range(2))
        for fd in (kick, call):
            stack.callback(os.close, fd)
        descriptors, available, used = (page * PAGE_BYTES for page in _area_pages(queue))
        self._request(_SET_VRING_NUM, struct.pack("=II", queue, _RING_SIZE))
        self._request(_SET_VRING_BASE, struct.pack("=II", queue, 0))
        areas = [self._start + area for area in (descriptors, used, available)]
        self._request(_SET_VRING_ADDR, struct.pack("=IIQQQQ", queue, _VRING_F_LOG, *areas, used))
        self._request(_SET_VRING_KICK, struct.pack("=Ii", queue, kick))
        self._request(_SET_VRING_CALL, struct.pack("=Ii", queue, call))
        return call

    def run(self, running: bool) -> None:
        self._request(_SET_RUNNING, struct.pack("=i", running))

    def offer_buffer(self) -> None:
        """Offer the page `_BUFFER_PAGE` for a packet."""
        descriptors, available, _ = (page * PAGE_BYTES for page in _area_pages(_RECEIVE))
        struct.pack_into(
            *("<QIHH", self.memory, descriptors),
            *(_BUFFER_PAGE * PAGE_BYTES, PAGE_BYTES, _DESCRIPTOR_WRITE, 0),
        )
        struct.pack_into("<HHH", self.memory, available, 0, 1, 0)

    def written_bytes(self) -> int:
        """Return how many bytes of the buffer the kernel has used; 0 if it has not used it."""
        used = _area_pages(_RECEIVE)[2] * PAGE_BYTES
        _, index, _, length = struct.unpack_from("<HHII", self.memory, used)
        return int(length) if index else 0

    def logged_pages(self) -> set[int]:
        return {page for page in range(_PAGES) if int(self.log[0]) >> page & 1}


@contextlib.contextmanager
def _vsock() -> Iterator[_Vsock]:
    with contextlib.ExitStack() as stack:
        try:
            device = os.open(_NODE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NotSupportedError(f"{_NODE}: {error.strerror}") from None
        stack.callback(os.close, device)
        yield _Vsock(device, stack)


def _only_used_ring_is_logged() -> str:
    with _vsock() as vsock, socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        vsock.offer_buffer()
        vsock.run(True)
        client.setblocking(False)
        number = client.connect_ex((_CID, _PORT))
        require(number == errno.EINPROGRESS, f"connect: {errno.errorcode.get(number, number)}")
        poll = select.poll()
        poll.register(vsock.calls[_RECEIVE], select.POLLIN)
        poll.poll(_TIMEOUT_MS)
        vsock.run(False)
        written, logged = vsock.written_bytes(), vsock.logged_pages()
    require(written == _PACKET_HEADER_BYTES, f"the kernel wrote a packet of {written} bytes")
    used = _area_pages(_RECEIVE)[2]
    require(used in logged, f"the used ring is not among the logged pages {sorted(logged)}")
    found = "not logged" if _BUFFER_PAGE not in logged else "logged"
    text = f"a packet of {written} bytes was written: the used ring is logged, the buffer {found}"
    observe(_BUFFER_PAGE not in logged, text)
    return text


def vhost_rules() -> dict[str, Rule]:
    """Return every rule of the kernel's vhost, by what it says."""
    return {"VSOCK: only the used ring is logged, not the packet": _only_used_ring_is_logged}
