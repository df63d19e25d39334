"""A front end of a server: its files, its socket, and the actions of QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Final

from dmaproof.devices import VirtioDevice, emulated_devices
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.units import div_ceil
from dmaproof.vhost_user.features import (
    F_ACCESS_PLATFORM,
    F_LOG_ALL,
    F_RING_EVENT_IDX,
    F_RING_PACKED,
    PROTOCOL_FEATURES,
)
from dmaproof.vhost_user.inflight import region_bytes
from dmaproof.vhost_user.messages import ProtocolFeature, Request, encode_request, encode_u64
from dmaproof.vhost_user.server import Server
from qmp_tools.testbed.ring_driver import HVA_BASE, PAGE
from support.hostile.layout import (
    CANARY,
    DEPTHS,
    DISK_BYTES,
    FEATURES,
    HIGH_BYTES,
    HIGH_GPAS,
    HIGH_OFFSET,
    LOG_OFFSET,
    LOW,
    QUEUE_SIZE,
    RAM_BYTES,
    RINGS,
)
from support.hostile.shared_file import SharedFile
from support.hostile.source import Source

MOST_TURNS: Final = 4096
"""More turns than rings of the largest size need."""


def _device(name: str) -> VirtioDevice:
    # The disk is small, so that requests reach its end.
    if name == "blk":
        return emulated_devices()[name](capacity_bytes=DISK_BYTES, queues=2)  # type: ignore[call-arg]
    return emulated_devices()[name]()


class Peer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.reasons: list[str] = []
        self._fds: list[int] = []
        self.cleanup = contextlib.ExitStack()
        self.high = source.pick(HIGH_GPAS)
        self.logged_gpas: list[tuple[int, int]] = []
        self.log_offsets: set[int] = set()
        pages = (self.high + HIGH_BYTES) // PAGE
        self.log_bytes = div_ceil(pages, 64) * 8
        self.ram = self._shared("ram", RAM_BYTES)
        self.log = self._shared("log", LOG_OFFSET + self.log_bytes + 4096)
        self.log.expected[:] = 0
        self.log.expected[:LOG_OFFSET] = self.log.expected[LOG_OFFSET + self.log_bytes :] = CANARY
        os.pwrite(self.log.fd, self.log.expected.tobytes(), 0)
        self.inflight = self._shared("inflight", 2 * region_bytes(QUEUE_SIZE) + PAGE)
        self.inflight.write(0, bytes(2 * region_bytes(QUEUE_SIZE)))
        self.device = _device(source.pick(sorted(emulated_devices())))
        self.rings = min(2, self.device.queues)
        self.packed = bool(source.integer(0, 1))
        self.protocol_features = PROTOCOL_FEATURES
        if not self.device.config():
            self.protocol_features &= ~ProtocolFeature.CONFIG
        self.features = FEATURES | (F_RING_PACKED if self.packed else 0)
        if source.integer(0, 2) == 2:
            self.features |= F_ACCESS_PLATFORM
        self.channel: socket.socket | None = None
        """The front end's end of the back-end channel."""
        self.next_available = [0, 0]
        """For each ring the next available index; of a packed ring the position over two rounds."""
        self.events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        self._fds += self.events
        self.control, server_end = socket.socketpair()
        self.control.setblocking(False)
        trackers = emulated_trackers()
        self.server = Server(
            self.device,
            trackers[source.pick(sorted(trackers))],
            server_end,
            harvest_interval_s=source.pick((1e-9, None)),
            immediate=bool(source.integer(0, 1)),
        )
        self.connected = False
        """Whether the server has a session with this front end, by the server's events."""
        self.socket = self._connect()

    def _shared(self, name: str, size: int) -> SharedFile:
        shared = SharedFile(name, size)
        self._fds.append(shared.fd)
        return shared

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.close()
        self.socket.close()
        if self.channel is not None:
            self.channel.close()
        self.control.close()
        self.cleanup.close()
        for fd in self._fds:
            os.close(fd)

    def settle(self) -> None:
        """Run turns of the server until it is idle, and record its events."""
        for _ in range(MOST_TURNS):
            busy = self.server.turn(0)
            with contextlib.suppress(BlockingIOError):
                for line in self.control.recv(1 << 20).splitlines():
                    event = json.loads(line)
                    if event["event"] in ("connected", "disconnected"):
                        self.connected = event["event"] == "connected"
                    if event["event"] in ("refused", "disconnected"):
                        self.reasons.append(event.get("message") or event["reason"])
            if not busy and not self._readable() and not self.answer_requests():
                break
        else:
            raise AssertionError("the server never becomes idle")
        if not self.connected and self.source.integer(0, 3):
            self.socket.close()
            self.socket = self._connect()
            for step in (self.boot, self.start_rings, self.start_logging)[
                : self.source.pick(DEPTHS)
            ]:
                step()

    def _readable(self) -> bool:
        return bool(select.select([self.server], [], [], 0)[0])

    # Sending ------------------------------------------------------------------------------------

    def _connect(self) -> socket.socket:
        own_end, server_end = socket.socketpair()
        own_end.setblocking(False)
        self.server.adopt("hostile", server_end)
        return own_end

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, and read answers so that neither side blocks."""
        with contextlib.suppress(OSError):
            self.socket.recv(1 << 16)
        with contextlib.suppress(OSError):  # the server has disconnected or reads no more
            socket.send_fds(self.socket, [data], list(fds)) if data else None

    def send(self, request: Request, payload: bytes, fds: Sequence[int] = ()) -> None:
        self.send_raw(encode_request(request, payload, need_reply=self.rarely()), fds)
        self.server.turn(0)

    def rarely(self) -> bool:
        return self.source.integer(0, 7) == 7

    def number(self, *likely: int) -> int:
        """Return one of `likely`, a number near one, or a number that may overflow a sum."""
        kind = self.source.integer(0, 15)
        if kind < 13 and likely:
            return likely[0] if kind < 8 else self.source.pick(likely)
        if kind < 15:
            base = self.source.pick((*likely, 0, PAGE, 1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64))
            return (base + self.source.integer(-17, 17)) % (1 << 64)
        return self.source.integer(0, (1 << 64) - 1)

    # Actions of QEMU ----------------------------------------------------------------------------

    def boot(self) -> None:
        """Set features and memory as QEMU does."""
        self.ram.resize(RAM_BYTES)
        event_index = F_RING_EVENT_IDX if self.source.integer(0, 1) else 0
        self.send(Request.SET_FEATURES, encode_u64(self.features | event_index))
        self.send(Request.SET_PROTOCOL_FEATURES, encode_u64(self.protocol_features))
        self.open_channel()
        self.set_memory(LOW, (self.high, HIGH_BYTES, HIGH_OFFSET))

    def open_channel(self) -> None:
        """Open the back-end channel."""
        if self.channel is not None:
            self.channel.close()
        self.channel, back_end = socket.socketpair()
        self.channel.setblocking(False)
        with back_end:
            self.send(Request.SET_BACKEND_REQ_FD, b"", [back_end.fileno()])

    def answer_requests(self) -> bool:
        """Answer the back end's requests, mostly as QEMU does; return whether there were any."""
        requests = b""
        with contextlib.suppress(OSError):
            requests = self.channel.recv(1 << 16) if self.channel is not None else b""
        for place in range(0, len(requests) // 44 * 44, 44):
            iova, access = struct.unpack_from("<Q16xB", requests, place + 12)
            gpa = iova - HVA_BASE if iova >= HVA_BASE else iova
            mapped = any(start <= gpa < start + size for start, size in self.logged_gpas)
            if mapped:
                self.send_iotlb(2, iova, PAGE, HVA_BASE + gpa, access)
            answer = struct.pack("<IIIQ", 1, 5, 8, not mapped)
            if self.source.integer(0, 31) == 31:
                answer = self.source.pick((b"", answer * 2, answer[:7], self.source.blob(40)))
            with contextlib.suppress(OSError):
                assert self.channel is not None
                self.channel.send(answer) if answer else None
        return bool(requests)

    def send_iotlb(self, event: int, iova: int, size: int, hva: int, access: int) -> None:
        """Send an IOTLB message. An IOVA equals the GPA or HVA that it is mapped to."""
        payload = struct.pack("<QQQBB6x", iova, size, hva % (1 << 64), access, event)
        self.send(Request.IOTLB_MSG, payload)

    def set_memory(self, *places: tuple[int, int, int]) -> None:
        """Send a memory table of the RAM's file, and share its slots with the server."""
        regions = b""
        for gpa, length, offset in places:
            regions += struct.pack("<QQQQ", gpa, length, (HVA_BASE + gpa) % (1 << 64), offset)
            self.ram.share(offset, length)
            self.logged_gpas.append((gpa, length))
        payload = struct.pack("<II", len(places), 0) + regions
        self.send(Request.SET_MEM_TABLE, payload, [self.ram.fd] * min(len(places), 9))

    def start_rings(self) -> None:
        """Start the rings as QEMU does."""
        for index in range(self.rings):
            self.send(Request.SET_VRING_NUM, struct.pack("<II", index, QUEUE_SIZE))
            self.send(Request.SET_VRING_BASE, struct.pack("<II", index, self.base(index)))
            self.set_address(index)
            self.send(Request.SET_VRING_CALL, encode_u64(index), [self.events[2]])
            self.send(Request.SET_VRING_KICK, encode_u64(index), [self.events[index]])
            self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def restart(self) -> None:
        """Set memory again and restart the rings."""
        self.boot()
        self.start_rings()

    def base(self, ring: int) -> int:
        """Return the ring's position in the form of SET_VRING_BASE."""
        if not self.packed:
            return self.next_available[ring]
        index, second_round = self.position(ring)
        return (index | (0 if second_round else 1 << 15)) * 0x1_0001

    def position(self, ring: int) -> tuple[int, bool]:
        """Return a packed ring's next descriptor, and whether it is in the second round."""
        position = self.next_available[ring] % (2 * QUEUE_SIZE)
        return position % QUEUE_SIZE, position >= QUEUE_SIZE

    def set_address(self, index: int, logged: bool = False) -> None:
        """Set a ring's correct addresses."""
        base = RINGS[index % 2]
        used = base + PAGE
        places = (HVA_BASE + base, HVA_BASE + used, HVA_BASE + base + 16 * QUEUE_SIZE, used)
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, int(logged), *places))

    def start_logging(self) -> None:
        """Set the log, then the feature."""
        self.set_log(self.log_bytes, LOG_OFFSET)
        self.send(Request.SET_FEATURES, encode_u64(self.features | F_LOG_ALL))
        for index in range(self.rings):
            self.set_address(index, logged=True)

    def set_log(self, size: int, offset: int, fd: int | None = None) -> None:
        """Send SET_LOG_BASE."""
        self.log_offsets.add(offset)
        if fd is None:
            self.log.share(offset, size)
        payload = struct.pack("<QQ", size, offset)
        self.send(Request.SET_LOG_BASE, payload, [self.log.fd if fd is None else fd])
