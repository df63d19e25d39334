"""A vhost-user front end that sends a device the messages that QEMU sends."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

from dmaproof.errors import ProtocolError
from dmaproof.units import PAGE_BYTES
from dmaproof.vhost_user.features import (
    F_ACCESS_PLATFORM,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    F_RING_INDIRECT_DESC,
    F_VERSION_1,
)
from dmaproof.vhost_user.messages import (
    HEADER_BYTES,
    MAX_FILE_DESCRIPTORS,
    InflightFile,
    IotlbChange,
    IotlbEvent,
    Request,
    encode_inflight,
    encode_iotlb,
    encode_request,
    encode_u64,
)

from ..host.timeout import DEFAULT_TIMEOUT_S
from .guest_iommu import GuestIommu, Page
from .ring_driver import HVA_BASE, Driver

FEATURES: Final = F_VERSION_1 | F_PROTOCOL_FEATURES | F_RING_INDIRECT_DESC
_REPLY_OF_VERSION_1: Final = 0b101
_QUESTION: Final = struct.Struct("<IIIQQQBB6x")
"""A back-end message's header, and struct vhost_iotlb_msg: iova, size, uaddr, perm, type."""


class FrontEnd:
    """The front end of the device at the other end of `peer`, with the event fds of its rings.

    `features` are those that the guest's driver has acknowledged. With an `iommu`, rings and
    buffers are addressed by its IOVAs. `timeout_s` bounds the wait for each answer.
    """

    def __init__(
        self,
        peer: socket.socket,
        features: int = FEATURES,
        iommu: GuestIommu | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.socket = peer
        self._timeout_s = timeout_s
        self.features = features | (F_ACCESS_PLATFORM if iommu else 0)
        self.iommu = iommu
        self.channel: socket.socket | None = None
        """The front end's end of the back-end channel."""
        self._rings: dict[int, int] = {}
        self.socket.settimeout(self._timeout_s)
        self.inflight: int | None = None
        """The device's file of in-flight requests, once the device has been asked for it."""
        self.inflight_reply = b""
        """The device's description of that file."""
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close everything."""
        self.socket.close()
        if self.channel is not None:
            self.channel.close()
        if self.inflight is not None:
            os.close(self.inflight)
        os.close(self.kick)
        os.close(self.call)

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message."""
        self.send_raw(encode_request(request, payload), fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes unchanged."""
        socket.send_fds(self.socket, [data], list(fds))

    def ask(
        self,
        request: Request,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> bytes:
        """Send a message and return the payload of the answer.

        Raises:
            ConnectionError: the device has closed the connection.
            ProtocolError: the device sent a different answer.
        """
        self.send_raw(encode_request(request, payload, need_reply=need_reply), fds)
        answer, _ = self._receive(request)
        return answer

    def _receive(self, request: Request) -> tuple[bytes, list[int]]:
        header, files, _, _ = socket.recv_fds(
            self.socket, HEADER_BYTES, MAX_FILE_DESCRIPTORS, socket.MSG_WAITALL
        )
        if len(header) < HEADER_BYTES:
            raise ConnectionError(f"{request.name}: the device has closed the connection")
        number, flags, size = struct.unpack("<III", header)
        if (number, flags & 7) != (request, _REPLY_OF_VERSION_1):
            raise ProtocolError(
                f"{request.name}: expected an answer to this request, got one to request {number} "
                f"with flags {flags:#x}"
            )
        return self.socket.recv(size, socket.MSG_WAITALL), files

    def track_inflight(self, queues: int, queue_size: int) -> None:
        """Let the device track in-flight requests, in its existing file if there is one."""
        if self.inflight is None:
            wanted = encode_inflight(InflightFile(0, 0, queues, queue_size))
            self.send(Request.GET_INFLIGHT_FD, wanted)
            self.inflight_reply, (self.inflight,) = self._receive(Request.GET_INFLIGHT_FD)
        self.send(Request.SET_INFLIGHT_FD, self.inflight_reply, [self.inflight])

    def set_memory(self, fd: int, *places: tuple[int, int, int]) -> None:
        """Send a memory table of (GPA, length, file offset) places of one file."""
        regions = b"".join(
            struct.pack("<QQQQ", gpa, length, HVA_BASE + gpa, offset)
            for gpa, length, offset in places
        )
        table = struct.pack("<II", len(places), 0) + regions
        self.send(Request.SET_MEM_TABLE, table, [fd] * len(places))

    def set_log(self, fd: int, size: int, offset: int = 0) -> None:
        """Send a dirty log to the device."""
        self.ask(Request.SET_LOG_BASE, struct.pack("<QQ", size, offset), [fd])

    def log_all(self, on: bool) -> None:
        """Switch dirty logging on or off."""
        self.send(Request.SET_FEATURES, encode_u64(self.features | (F_LOG_ALL if on else 0)))

    def open_channel(self) -> None:
        """Give the device the back-end channel, on which it sends its own requests."""
        if self.channel is not None:
            self.channel.close()
        self.channel, device_end = socket.socketpair()
        self.channel.settimeout(self._timeout_s)
        with device_end:
            self.send(Request.SET_BACKEND_REQ_FD, fds=[device_end.fileno()])

    def update(self, page: Page) -> None:
        """Send a mapping to the device, and wait for its acknowledgement."""
        self._change(IotlbEvent.UPDATE, page.iova, PAGE_BYTES, HVA_BASE + page.gpa, page.access)

    def invalidate(self, iova: int, length: int) -> None:
        """Invalidate the mappings of `length` bytes at `iova`, and wait for the acknowledgement."""
        self._change(IotlbEvent.INVALIDATE, iova, length, 0, 0)

    def _change(self, *change: Any) -> None:
        self.ask(Request.IOTLB_MSG, encode_iotlb(IotlbChange(*change)), need_reply=True)

    def answer_misses(self) -> int:
        """Answer the IOTLB misses on the back-end channel, and return their number.

        As in QEMU, the mapping comes first, and then the reply that says whether one exists.
        """
        assert self.channel is not None
        assert self.iommu is not None
        questions = 0
        while select.select([self.channel], [], [], 0)[0]:
            question = self.channel.recv(_QUESTION.size, socket.MSG_WAITALL)
            if not question:
                break
            number, _, _, iova, _, _, access, event = _QUESTION.unpack(question)
            if event != IotlbEvent.MISS:
                raise ProtocolError(
                    f"back-end channel: expected an IOTLB miss, got IOTLB message type {event}"
                )
            page = self.iommu.page(iova, access)
            if page is not None:
                self.update(page)
            self.channel.sendall(struct.pack("<IIIQ", number, _REPLY_OF_VERSION_1, 8, not page))
            questions += 1
        return questions

    def set_ring_address(self, driver: Driver, *, index: int = 0, logged: bool = False) -> None:
        """Send the addresses of a ring: HVAs, or IOVAs if there is an IOMMU."""
        parts = [driver.descriptors, driver.used, driver.available]
        if self.iommu is None:
            places = [*(HVA_BASE + gpa for gpa in parts), driver.used]
        else:
            moved = self._ring_iova(driver) - driver.descriptors
            places = [gpa + moved for gpa in (*parts, driver.used)]
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, int(logged), *places))

    def _ring_iova(self, driver: Driver) -> int:
        """Return the IOVA of a ring; map the ring first if necessary."""
        assert self.iommu is not None
        if driver.descriptors not in self._rings:
            start = driver.descriptors % PAGE_BYTES
            self._rings[driver.descriptors] = self.iommu.map_pages(driver.pages) + start
        return self._rings[driver.descriptors]

    def start_ring(
        self, driver: Driver, index: int = 0, *, base: int | None = None, logged: bool = False
    ) -> None:
        """Send the messages with which QEMU starts a ring, at its beginning or at `base`."""
        base = driver.base if base is None else base
        self.send(Request.SET_VRING_NUM, struct.pack("<II", index, driver.size))
        self.send(Request.SET_VRING_BASE, struct.pack("<II", index, base))
        self.set_ring_address(driver, index=index, logged=logged)
        self.send(Request.SET_VRING_CALL, encode_u64(index), [self.call])
        self.send(Request.SET_VRING_KICK, encode_u64(index), [self.kick])
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop_ring(self, index: int = 0) -> int:
        """Send the messages with which QEMU stops a ring, and return its position."""
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 0))
        answer = self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0))
        position: int = struct.unpack("<II", answer)[1]
        return position
