"""A vhost-user front end: says to a device what QEMU says, message by message."""

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
    """The front end's end of `peer`, with the event file descriptors of one device's rings.

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
        """Our end of the back-end channel."""
        self._rings: dict[int, int] = {}
        self.socket.settimeout(self._timeout_s)
        self.inflight: int | None = None
        """The file in which the device notes what is in flight, once it was asked for one."""
        self.inflight_said = b""
        """What it said of that file."""
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
        """Send bytes as they are."""
        socket.send_fds(self.socket, [data], list(fds))

    def ask(
        self,
        request: Request,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> bytes:
        """Send a message and return its answer's payload.

        Raises:
            ConnectionError: the device has hung up.
            ProtocolError: it answered something else.
        """
        self.send_raw(encode_request(request, payload, need_reply=need_reply), fds)
        answer, _ = self._receive(request)
        return answer

    def _receive(self, request: Request) -> tuple[bytes, list[int]]:
        header, files, _, _ = socket.recv_fds(
            self.socket, HEADER_BYTES, MAX_FILE_DESCRIPTORS, socket.MSG_WAITALL
        )
        if len(header) < HEADER_BYTES:
            raise ConnectionError(f"{request.name}: the device has hung up")
        number, flags, size = struct.unpack("<III", header)
        if (number, flags & 7) != (request, _REPLY_OF_VERSION_1):
            raise ProtocolError(
                f"{request.name}: the device answers request {number} with flags {flags:#x}"
            )
        return self.socket.recv(size, socket.MSG_WAITALL), files

    def track_inflight(self, queues: int, queue_size: int) -> None:
        """Let the device note what is in flight; with a file that there is, go on from it."""
        if self.inflight is None:
            wanted = encode_inflight(InflightFile(0, 0, queues, queue_size))
            self.send(Request.GET_INFLIGHT_FD, wanted)
            self.inflight_said, (self.inflight,) = self._receive(Request.GET_INFLIGHT_FD)
        self.send(Request.SET_INFLIGHT_FD, self.inflight_said, [self.inflight])

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
        self.send(Request.SET_FEATURES, encode_u64(self.features | (F_LOG_ALL if on else 0)))

    def open_channel(self) -> None:
        """Give the device its own way to ask."""
        if self.channel is not None:
            self.channel.close()
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(self._timeout_s)
        with theirs:
            self.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def update(self, page: Page) -> None:
        """Tell of a mapping; returns when the device has taken notice."""
        self._change(IotlbEvent.UPDATE, page.iova, PAGE_BYTES, HVA_BASE + page.gpa, page.access)

    def invalidate(self, iova: int, length: int) -> None:
        """Tell that nothing in `length` bytes at `iova` leads anywhere any more, and wait."""
        self._change(IotlbEvent.INVALIDATE, iova, length, 0, 0)

    def _change(self, *change: Any) -> None:
        self.ask(Request.IOTLB_MSG, encode_iotlb(IotlbChange(*change)), need_reply=True)

    def answer_misses(self) -> int:
        """Answer what the device has asked on its channel; returns how many questions that were.

        As QEMU does: the mapping first, then whether there was one.
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
                raise ProtocolError(f"back-end channel: an IOTLB message of type {event}")
            page = self.iommu.page(iova, access)
            if page is not None:
                self.update(page)
            self.channel.sendall(struct.pack("<IIIQ", number, _REPLY_OF_VERSION_1, 8, not page))
            questions += 1
        return questions

    def set_ring_address(self, driver: Driver, *, index: int = 0, logged: bool = False) -> None:
        """Tell where a ring stands: by HVAs, or by IOVAs if there is an IOMMU."""
        parts = [driver.descriptors, driver.used, driver.available]
        if self.iommu is None:
            places = [*(HVA_BASE + gpa for gpa in parts), driver.used]
        else:
            moved = self._ring_iova(driver) - driver.descriptors
            places = [gpa + moved for gpa in (*parts, driver.used)]
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, int(logged), *places))

    def _ring_iova(self, driver: Driver) -> int:
        """Where a ring is mapped."""
        assert self.iommu is not None
        if driver.descriptors not in self._rings:
            start = driver.descriptors % PAGE_BYTES
            self._rings[driver.descriptors] = self.iommu.map_pages(driver.pages) + start
        return self._rings[driver.descriptors]

    def start_ring(
        self, driver: Driver, index: int = 0, *, base: int | None = None, logged: bool = False
    ) -> None:
        """The messages with which QEMU starts a ring; at its beginning, unless `base` is given."""
        base = driver.base if base is None else base
        self.send(Request.SET_VRING_NUM, struct.pack("<II", index, driver.size))
        self.send(Request.SET_VRING_BASE, struct.pack("<II", index, base))
        self.set_ring_address(driver, index=index, logged=logged)
        self.send(Request.SET_VRING_CALL, encode_u64(index), [self.call])
        self.send(Request.SET_VRING_KICK, encode_u64(index), [self.kick])
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop_ring(self, index: int = 0) -> None:
        """The messages with which QEMU stops a ring; returns when the device has stopped it."""
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 0))
        self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0))
