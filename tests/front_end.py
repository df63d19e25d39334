"""A vhost-user front end for tests: what QEMU says, and what it should never say."""

from __future__ import annotations

import os
import selectors
import socket
import struct
from collections.abc import Sequence

from dmaproof.devices.blk import Blk
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.faults import Fault, NoFault
from dmaproof.vhost_user.connection import Connection
from dmaproof.vhost_user.messages import HEADER_BYTES, Request, encode_request, encode_u64
from dmaproof.vhost_user.session import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    F_RING_INDIRECT_DESC,
    F_VERSION_1,
    Session,
)
from ring_driver import HVA_BASE, RingDriver

FEATURES = F_VERSION_1 | F_PROTOCOL_FEATURES | F_RING_INDIRECT_DESC


class FrontEnd:
    """Drives one `Session` in this very thread: send, let it receive, read the answer."""

    def __init__(
        self, device: Blk | None = None, *, immediate: bool = False, fault: Fault | None = None
    ) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(5)
        self.selector = selectors.DefaultSelector()
        self.session = Session(
            Connection(theirs),
            device or Blk(1 << 30, queues=2),
            emulated_trackers()["iommu"](),
            self.selector,
            immediate=immediate,
            wrap_log=(fault or NoFault()).wrap_log,
        )
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close everything."""
        self.session.close()
        self.socket.close()
        self.selector.close()
        os.close(self.kick)
        os.close(self.call)

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message and let the session receive it."""
        self.send_raw(encode_request(request, payload), fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are and let the session receive them."""
        socket.send_fds(self.socket, [data], list(fds))
        self.session.receive()

    def ask(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message and return its answer's payload."""
        self.send(request, payload, fds)
        header = self.socket.recv(HEADER_BYTES, socket.MSG_WAITALL)
        number, flags, size = struct.unpack("<III", header)
        assert (number, flags & 7) == (request, 5)
        return self.socket.recv(size, socket.MSG_WAITALL)

    def set_memory(self, fd: int, *places: tuple[int, int, int]) -> None:
        """Send a memory table of (GPA, length, file offset) places of one file."""
        regions = b"".join(
            struct.pack("<QQQQ", gpa, length, HVA_BASE + gpa, offset)
            for gpa, length, offset in places
        )
        table = struct.pack("<II", len(places), 0) + regions
        self.send(Request.SET_MEM_TABLE, table, [fd] * len(places))

    def set_log(self, fd: int, size: int, offset: int = 0) -> None:
        """Hand over a dirty log."""
        self.ask(Request.SET_LOG_BASE, struct.pack("<QQ", size, offset), [fd])

    def log_all(self, on: bool) -> None:
        """Switch dirty logging."""
        self.send(Request.SET_FEATURES, encode_u64(FEATURES | (F_LOG_ALL if on else 0)))

    def set_ring_address(self, driver: RingDriver, *, index: int = 0, logged: bool = False) -> None:
        """Tell where a ring stands."""
        self.send(
            Request.SET_VRING_ADDR,
            struct.pack(
                "<IIQQQQ",
                index,
                int(logged),
                HVA_BASE + driver.descriptors,
                HVA_BASE + driver.used,
                HVA_BASE + driver.available,
                driver.used,
            ),
        )

    def start_ring(self, driver: RingDriver, index: int = 0) -> None:
        """The messages with which QEMU starts a ring."""
        self.send(Request.SET_VRING_NUM, struct.pack("<II", index, driver.size))
        self.send(Request.SET_VRING_BASE, struct.pack("<II", index, 0))
        self.set_ring_address(driver, index=index)
        self.send(Request.SET_VRING_CALL, encode_u64(index), [self.call])
        self.send(Request.SET_VRING_KICK, encode_u64(index), [self.kick])
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def serve(self) -> None:
        """Kick, and let the session serve its rings until they are empty."""
        os.eventfd_write(self.kick, 1)
        for key, _ in self.selector.select(0):
            key.data()
        while self.session.serve_rings():
            pass
