"""A vhost-user front end: says to a device what QEMU says, message by message."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from dmaproof.errors import ProtocolError
from dmaproof.vhost_user.messages import HEADER_BYTES, Request, encode_request, encode_u64
from dmaproof.vhost_user.session import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    F_RING_INDIRECT_DESC,
    F_VERSION_1,
)

from .ring_driver import HVA_BASE, RingDriver

FEATURES: Final = F_VERSION_1 | F_PROTOCOL_FEATURES | F_RING_INDIRECT_DESC
_ANSWER_TIMEOUT_S: Final = 20.0
_REPLY_OF_VERSION_1: Final = 0b101


class FrontEnd:
    """The front end's end of `peer`, with the event file descriptors of one device's rings."""

    def __init__(self, peer: socket.socket) -> None:
        self.socket = peer
        self.socket.settimeout(_ANSWER_TIMEOUT_S)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close everything."""
        self.socket.close()
        os.close(self.kick)
        os.close(self.call)

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message."""
        self.send_raw(encode_request(request, payload), fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are."""
        socket.send_fds(self.socket, [data], list(fds))

    def ask(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message and return its answer's payload.

        Raises:
            ConnectionError: the device has hung up.
            ProtocolError: it answered something else.
        """
        self.send(request, payload, fds)
        header = self.socket.recv(HEADER_BYTES, socket.MSG_WAITALL)
        if len(header) < HEADER_BYTES:
            raise ConnectionError(f"{request.name}: the device has hung up")
        number, flags, size = struct.unpack("<III", header)
        if (number, flags & 7) != (request, _REPLY_OF_VERSION_1):
            raise ProtocolError(
                f"{request.name}: the device answers request {number} with flags {flags:#x}"
            )
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

    def stop_ring(self, index: int = 0) -> None:
        """The messages with which QEMU stops a ring; returns when the device has stopped it."""
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 0))
        self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0))
