"""A front end and a guest that do anything, against the real server: what fuzzers drive.

A `Source` decides everything: Hypothesis, or a coverage-guided fuzzer. What is sent is valid often
enough to get far. Whatever it is, the server must raise nothing, come to rest after a bounded
number of turns, write nowhere but into the slots and the log that it was given, set log bits for
pages of slots alone, and leave no file descriptor and no mapping behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import math
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from unittest import mock

import numpy as np

from dmaproof.devices import VirtioDevice, emulated_devices
from dmaproof.devices.net import ETHERTYPE
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.units import div_ceil
from dmaproof.vhost_user import vring
from dmaproof.vhost_user.features import (
    F_ACCESS_PLATFORM,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
    PROTOCOL_FEATURES,
)
from dmaproof.vhost_user.inflight import region_bytes
from dmaproof.vhost_user.messages import ProtocolFeature, Request, encode_request, encode_u64
from dmaproof.vhost_user.server import Server
from qmp_tools.testbed.ring_driver import HVA_BASE, INDIRECT, NEXT, PAGE, WRITE

T = TypeVar("T")

_FEATURES: Final = F_VERSION_1 | F_PROTOCOL_FEATURES | F_RING_INDIRECT_DESC
_QUEUE_SIZE: Final = 8
_DISK_BYTES: Final = 1 << 24
_STEPS: Final = 40
_DEPTHS: Final = (0, 1, 2, 2, 3, 3, 3)
"""How much of what QEMU does first is done before anything else."""
_MOST_TURNS: Final = 4096
"""More than it takes to empty rings of the largest size."""

_LOW: Final = (0, 24 * PAGE, 4 * PAGE)
_RAM_BYTES: Final = 64 * PAGE
_HIGH_GPAS: Final = (64 * PAGE, 1 << 32)
_HIGH_BYTES, _HIGH_OFFSET = 9 * PAGE, 40 * PAGE
_LOG_OFFSET: Final = 64
_CANARY: Final = 0xA5

_RINGS: Final = (PAGE, 4 * PAGE)
"""GPAs of the two rings: descriptors, behind them what the driver writes (the available ring, or
its event suppression structure), and a page on what the device writes."""
_AVAIL, _USED = 1 << 7, 1 << 15
_TABLE, _HEADER, _STATUS, _DATA = 8 * PAGE, 10 * PAGE, 11 * PAGE, 12 * PAGE


class Source(Protocol):
    """Whoever decides."""

    def integer(self, low: int, high: int) -> int:
        """Some number from `low` to `high`, both included."""

    def blob(self, most: int) -> bytes:
        """Up to `most` bytes."""

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""


def attack(source: Source) -> list[str]:
    """Play one story; returns why sessions ended.

    Raises:
        AssertionError: the server did what it must never do.
    """
    gc.collect(0)
    fds_before, mappings_before = _open_files(), _shared_mappings()
    with (
        # What happens follows from the source alone: neither from how fast the machine is, nor from
        # what the entropy device finds, which may become a ring.
        mock.patch.object(vring, "_TURN_S", math.inf),
        mock.patch.object(os, "urandom", bytes),
        _Peer(source) as peer,
    ):
        peer.play()
        reasons = peer.reasons
    del peer  # and with it the disk's file
    if (_open_files(), _shared_mappings()) != (fds_before, mappings_before):
        gc.collect()  # the server, or an exception's traceback, may be part of a cycle
    assert _shared_mappings() == mappings_before, "a mapping was left behind"
    assert _open_files() == fds_before, "a file descriptor was left behind"
    return reasons


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _shared_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:hostile")


class _Shared:
    """A file shared with the server; `mine` is what it holds but for what the server wrote."""

    def __init__(self, name: str, size: int, offset: int = 0) -> None:
        self.fd = os.memfd_create(f"hostile-{name}", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.mine = np.full(size, _CANARY, dtype=np.uint8)
        self.mine[offset:] = 0
        os.pwrite(self.fd, self.mine.tobytes(), 0)
        self.given = np.zeros(size, dtype=bool)

    def write(self, offset: int, data: bytes) -> None:
        piece = data[: max(0, len(self.mine) - offset)]
        if piece:
            with contextlib.suppress(PermissionError):  # cut short and then sealed
                os.pwrite(self.fd, piece, offset)
                self.mine[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)

    def resize(self, size: int) -> None:
        """What is cut away comes back as zeros, if the file ever grows again."""
        with contextlib.suppress(PermissionError):  # sealed
            os.ftruncate(self.fd, size)
            self.mine[size:] = 0

    def give(self, offset: int, length: int) -> None:
        self.given[offset : offset + length] = True

    def content(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = os.pread(self.fd, len(self.mine), 0)
        return np.frombuffer(data.ljust(len(self.mine), b"\0"), np.uint8)

    def check(self, name: str) -> None:
        wrong = np.flatnonzero((self.content() != self.mine) & ~self.given)
        assert not len(wrong), f"{name}: written outside what was given, at {wrong[0]:#x}"


class _Peer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.reasons: list[str] = []
        self._fds: list[int] = []
        self._stack = contextlib.ExitStack()
        self.high = source.pick(_HIGH_GPAS)
        self.logged_gpas: list[tuple[int, int]] = []
        self.log_offsets: set[int] = set()
        pages = (self.high + _HIGH_BYTES) // PAGE
        self.log_bytes = div_ceil(pages, 64) * 8
        self.ram = self._shared("ram", _RAM_BYTES)
        self.log = self._shared("log", _LOG_OFFSET + self.log_bytes + 4096)
        self.log.mine[:] = 0
        self.log.mine[:_LOG_OFFSET] = self.log.mine[_LOG_OFFSET + self.log_bytes :] = _CANARY
        os.pwrite(self.log.fd, self.log.mine.tobytes(), 0)
        self.inflight = self._shared("inflight", 2 * region_bytes(_QUEUE_SIZE) + PAGE)
        self.inflight.write(0, bytes(2 * region_bytes(_QUEUE_SIZE)))
        self.device = _device(source.pick(sorted(emulated_devices())))
        self.rings = min(2, self.device.queues)
        self.packed = bool(source.integer(0, 1))
        self.protocol_features = PROTOCOL_FEATURES
        if not self.device.config():
            self.protocol_features &= ~ProtocolFeature.CONFIG
        self.features = _FEATURES | (F_RING_PACKED if self.packed else 0)
        if source.integer(0, 2) == 2:
            self.features |= F_ACCESS_PLATFORM
        self.channel: socket.socket | None = None
        """Our end of the back-end channel."""
        self.next_available = [0, 0]
        """Of a packed ring: the position over two rounds of it."""
        self.events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        self._fds += self.events
        self.control, theirs = socket.socketpair()
        self.control.setblocking(False)
        trackers = emulated_trackers()
        self.server = Server(
            self.device,
            trackers[source.pick(sorted(trackers))],
            theirs,
            harvest_interval_s=source.pick((1e-9, None)),
            immediate=bool(source.integer(0, 1)),
        )
        self.socket = self._connect()

    def _shared(self, name: str, size: int) -> _Shared:
        shared = _Shared(name, size)
        self._fds.append(shared.fd)
        return shared

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.close()
        self.socket.close()
        if self.channel is not None:
            self.channel.close()
        self.control.close()
        self._stack.close()
        for fd in self._fds:
            os.close(fd)

    def play(self) -> None:
        """Some of what QEMU does, then anything."""
        for step in (self.boot, self.start_rings, self.start_logging)[: self.source.pick(_DEPTHS)]:
            step()
        for _ in range(self.source.integer(0, _STEPS)):
            self.source.pick(_STEPS_BY_WEIGHT)(self)
            self.settle()
        files = {"RAM": self.ram, "log": self.log, "in-flight region": self.inflight}
        for name, shared in files.items():
            shared.check(name)
        self._check_log_bits()

    def settle(self) -> None:
        """Turns of the server until it has nothing more to do, and what it tells."""
        for _ in range(_MOST_TURNS):
            busy = self.server.turn(0)
            with contextlib.suppress(BlockingIOError):
                for line in self.control.recv(1 << 20).splitlines():
                    event = json.loads(line)
                    if event["event"] in ("refused", "gone"):
                        self.reasons.append(event.get("message") or event["reason"])
            if not busy and not self._readable() and not self.answer_questions():
                break
        else:
            raise AssertionError("the server never comes to rest")
        if not self.server._sessions and self.source.integer(0, 3):
            self.socket.close()
            self.socket = self._connect()
            for step in (self.boot, self.start_rings, self.start_logging)[
                : self.source.pick(_DEPTHS)
            ]:
                step()

    def _readable(self) -> bool:
        return bool(self.server._selector.select(0))

    def _check_log_bits(self) -> None:
        """Bits that the server set are those of pages of slots."""
        set_by_server = self.log.content() & ~self.log.mine
        for bit in np.flatnonzero(np.unpackbits(set_by_server, bitorder="little")).tolist():
            gpas = [(bit - 8 * offset) * PAGE for offset in self.log_offsets]
            assert any(self._is_in_a_slot(gpa) for gpa in gpas), (
                f"the log has bit {bit} of its file set: of no page in a slot, whichever of the "
                f"offsets {sorted(self.log_offsets)} it began at"
            )

    def _is_in_a_slot(self, gpa: int) -> bool:
        return any(start <= gpa < start + length for start, length in self.logged_gpas)

    # Saying things ------------------------------------------------------------------------------

    def _connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.server.adopt("hostile", theirs)
        return ours

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, and take answers so that neither side is ever stuck."""
        with contextlib.suppress(OSError):
            self.socket.recv(1 << 16)
        with contextlib.suppress(OSError):  # the server has hung up, or reads no more
            socket.send_fds(self.socket, [data], list(fds)) if data else None

    def send(self, request: Request, payload: bytes, fds: Sequence[int] = ()) -> None:
        self.send_raw(encode_request(request, payload, need_reply=self._rarely()), fds)
        self.server.turn(0)

    def _rarely(self) -> bool:
        return self.source.integer(0, 7) == 7

    def number(self, *likely: int) -> int:
        """One of `likely`, near one of them, or what breaks sums."""
        kind = self.source.integer(0, 15)
        if kind < 13 and likely:
            return likely[0] if kind < 8 else self.source.pick(likely)
        if kind < 15:
            base = self.source.pick((*likely, 0, PAGE, 1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64))
            return (base + self.source.integer(-17, 17)) % (1 << 64)
        return self.source.integer(0, (1 << 64) - 1)

    # What QEMU does -----------------------------------------------------------------------------

    def boot(self) -> None:
        """The features and the memory of an honest front end."""
        self.ram.resize(_RAM_BYTES)
        event_index = F_RING_EVENT_IDX if self.source.integer(0, 1) else 0
        self.send(Request.SET_FEATURES, encode_u64(self.features | event_index))
        self.send(Request.SET_PROTOCOL_FEATURES, encode_u64(self.protocol_features))
        self.open_channel()
        self.set_memory(_LOW, (self.high, _HIGH_BYTES, _HIGH_OFFSET))

    def open_channel(self) -> None:
        """Give the back end a way to ask."""
        if self.channel is not None:
            self.channel.close()
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.send(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])

    def answer_questions(self) -> bool:
        """Answer what the back end has asked, nearly always as QEMU would; whether it had."""
        questions = b""
        with contextlib.suppress(OSError):
            questions = self.channel.recv(1 << 16) if self.channel is not None else b""
        for place in range(0, len(questions) // 44 * 44, 44):
            iova, access = struct.unpack_from("<Q16xB", questions, place + 12)
            gpa = iova - HVA_BASE if iova >= HVA_BASE else iova
            there_is = any(start <= gpa < start + size for start, size in self.logged_gpas)
            if there_is:
                self.tell_iotlb(2, iova, PAGE, HVA_BASE + gpa, access)
            answer = struct.pack("<IIIQ", 1, 5, 8, not there_is)
            if self.source.integer(0, 31) == 31:
                answer = self.source.pick((b"", answer * 2, answer[:7], self.source.blob(40)))
            with contextlib.suppress(OSError):
                assert self.channel is not None
                self.channel.send(answer) if answer else None
        return bool(questions)

    def tell_iotlb(self, event: int, iova: int, size: int, hva: int, access: int) -> None:
        """An IOTLB message. IOVAs lead to the GPAs of the same number, or of their HVAs."""
        payload = struct.pack("<QQQBB6x", iova, size, hva % (1 << 64), access, event)
        self.send(Request.IOTLB_MSG, payload)

    def set_memory(self, *places: tuple[int, int, int]) -> None:
        """A memory table of the RAM's file; what it gives may be written."""
        regions = b""
        for gpa, length, offset in places:
            regions += struct.pack("<QQQQ", gpa, length, (HVA_BASE + gpa) % (1 << 64), offset)
            self.ram.give(offset, length)
            self.logged_gpas.append((gpa, length))
        payload = struct.pack("<II", len(places), 0) + regions
        self.send(Request.SET_MEM_TABLE, payload, [self.ram.fd] * min(len(places), 9))

    def start_rings(self) -> None:
        """The rings as QEMU starts them."""
        for index in range(self.rings):
            self.send(Request.SET_VRING_NUM, struct.pack("<II", index, _QUEUE_SIZE))
            self.send(Request.SET_VRING_BASE, struct.pack("<II", index, self.base(index)))
            self.set_address(index)
            self.send(Request.SET_VRING_CALL, encode_u64(index), [self.events[2]])
            self.send(Request.SET_VRING_KICK, encode_u64(index), [self.events[index]])
            self.send(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def restart(self) -> None:
        """Memory and rings anew."""
        self.boot()
        self.start_rings()

    def base(self, ring: int) -> int:
        """Where the ring goes on, as SET_VRING_BASE has it."""
        if not self.packed:
            return self.next_available[ring]
        index, second_round = self.position(ring)
        return (index | (0 if second_round else 1 << 15)) * 0x1_0001

    def position(self, ring: int) -> tuple[int, bool]:
        """A packed ring's next descriptor, and whether it is in its second round."""
        position = self.next_available[ring] % (2 * _QUEUE_SIZE)
        return position % _QUEUE_SIZE, position >= _QUEUE_SIZE

    def set_address(self, index: int, logged: bool = False) -> None:
        """A ring's honest address."""
        base = _RINGS[index % 2]
        used = base + PAGE
        places = (HVA_BASE + base, HVA_BASE + used, HVA_BASE + base + 16 * _QUEUE_SIZE, used)
        self.send(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, int(logged), *places))

    def start_logging(self) -> None:
        """The log, then the feature."""
        self.give_log(self.log_bytes, _LOG_OFFSET)
        self.send(Request.SET_FEATURES, encode_u64(self.features | F_LOG_ALL))
        for index in range(self.rings):
            self.set_address(index, logged=True)

    def give_log(self, size: int, offset: int, fd: int | None = None) -> None:
        """SET_LOG_BASE."""
        self.log_offsets.add(offset)
        if fd is None:
            self.log.give(offset, size)
        payload = struct.pack("<QQ", size, offset)
        self.send(Request.SET_LOG_BASE, payload, [self.log.fd if fd is None else fd])

    # What it never does -------------------------------------------------------------------------

    def some_fds(self, most: int) -> list[int]:
        """File descriptors of odd kinds, closed with the peer."""
        return [self.some_fd() for _ in range(self.source.integer(0, most))]

    def some_fd(self) -> int:
        """A file descriptor of an odd kind, or an honest one."""
        kind = self.source.pick(_KINDS)
        opened = kind(self)
        self._stack.callback(os.close, opened)
        return opened

    def any_message(self) -> None:
        """A header and a payload of anything, with anything."""
        number = self.source.pick((*Request, 0, 4, 19, 23, 31, 999, 0xFFFFFFFF))
        flags = self.source.pick((1, 1, 1, 9, 0, 2, 5, 0xFFFFFFFF))
        payload = self.source.blob(300)
        size = self.source.pick((len(payload), len(payload), len(payload) + 1, 4097, 0, 0xFFFFFFFF))
        fds = self.some_fds(10)
        for fd in fds:
            self._forgive(fd)
        self.send_raw(struct.pack("<III", number, flags, size) + payload, fds)

    def _forgive(self, fd: int) -> None:
        """A file that came with a message of chance may be written anywhere."""
        for shared in (self.ram, self.log, self.inflight):
            if os.path.sameopenfile(fd, shared.fd):
                shared.given[:] = True
                self.logged_gpas.append((0, 1 << 64))

    def part_of_a_message(self) -> None:
        """A message that is cut off; perhaps the rest comes, perhaps another message."""
        data = encode_request(
            self.source.pick(tuple(Request)), encode_u64(self.number(0, 1, _FEATURES))
        )
        cut = self.source.integer(1, len(data) - 1)
        self.send_raw(data[:cut], self.some_fds(2))
        self.server.turn(0)
        if self.source.integer(0, 1):
            self.send_raw(data[cut:], self.some_fds(2))

    def set_features(self) -> None:
        """Features in any combination."""
        bit = 1 << self.source.integer(0, 63)
        features = self.features | self.source.pick((0, F_LOG_ALL, F_RING_EVENT_IDX))
        features = self.source.pick((features, features ^ bit, features & ~F_PROTOCOL_FEATURES))
        self.send(Request.SET_FEATURES, encode_u64(features))
        if self._rarely():
            features = self.source.pick((self.protocol_features, 0, PROTOCOL_FEATURES | bit))
            self.send(Request.SET_PROTOCOL_FEATURES, encode_u64(features))

    def memory_table(self) -> None:
        """A table that may overlap, leave the address space or the file."""
        places = []
        for honest in (_LOW, (self.high, _HIGH_BYTES, _HIGH_OFFSET))[: self.source.integer(0, 2)]:
            gpa = self.number(honest[0], self.high, 4 * PAGE, 28 * PAGE, (1 << 64) - PAGE)
            length = self.number(honest[1], PAGE, 2 * PAGE, 0, 1 << 40)
            offset = self.number(honest[2], 0, 100, (1 << 63) - 1)
            places.append((gpa, length, offset))
        self.set_memory(*places)

    def memory_of_odd_files(self) -> None:
        """Files that are no RAM, or are huge."""
        count = self.source.integer(1, 3)
        regions = b""
        for index in range(count):
            gpa = self.number(index << 32, index * 32 * PAGE)
            regions += struct.pack(
                "<QQQQ", gpa, self.number(PAGE, 1 << 30, 1 << 46), HVA_BASE + index, self.number(0)
            )
        fds = [self.some_fd() for _ in range(self.source.pick((count, count, count, 0, 8, 9)))]
        for fd in fds:
            self._forgive(fd)
        self.send(Request.SET_MEM_TABLE, struct.pack("<II", count, 0) + regions, fds)

    def odd_log(self) -> None:
        """A log of a wrong size or place, or in a file that is none."""
        size = self.number(self.log_bytes, self.log_bytes - 8, 1 << 20, 8)
        offset = self.number(_LOG_OFFSET, 0, 8)
        fd = None if self.source.integer(0, 1) else self.some_fd()
        if fd is not None:
            self._forgive(fd)
        self.give_log(size, offset, fd)

    def ring_state(self) -> None:
        """Any state message of a ring that may not be there."""
        request = self.source.pick(_STATES)
        index = self.ring()
        value = self.number(*_LIKELY_STATES[request]) & 0xFFFFFFFF
        self.send(request, struct.pack("<II", index, value))

    def ring_address(self) -> None:
        """Addresses where nothing is, or one part upon another."""
        index = self.ring()
        base = _RINGS[index % 2]
        odd = (base, base + PAGE, base + 16 * _QUEUE_SIZE, _LOW[1] - 64, self.high)
        honest = (base, base + PAGE, base + 16 * _QUEUE_SIZE)
        places = [HVA_BASE + self.number(place, *odd) for place in honest]
        log = self.number(base + PAGE, base)
        flags = self.source.pick((0, 0, 1, 0xFFFFFFFF))
        payload = struct.pack("<IIQQQQ", index, flags, *(p % (1 << 64) for p in places), log)
        self.send(Request.SET_VRING_ADDR, payload)

    def event_fds(self) -> None:
        """A kick or call of an odd kind, or none."""
        request = self.source.pick(
            (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
        )
        value = self.source.pick((0, 0, 1, 1, 2, 255, 256, 257, (1 << 64) - 1))
        count = self.source.pick((0, 1, 1, 1, 2))
        self.send(request, encode_u64(value), [self.some_fd() for _ in range(count)])

    def any_mapping(self) -> None:
        """A mapping comes or goes: an honest one, or of anything."""
        event = self.source.pick((2, 2, 2, 3, 3, 1, 4, 0, 255))
        iova = self.number(_DATA, *_RINGS, HVA_BASE + _RINGS[0], 1 << 47, 0)
        size = self.number(PAGE, 4 * PAGE, 0, 1 << 30, 1 << 47)
        hva = HVA_BASE + self.number(_DATA, _RINGS[0], self.high)
        self.tell_iotlb(event, iova, size, hva, self.source.pick((3, 3, 1, 2, 0, 4)))

    def everything_unmapped(self) -> None:
        """The guest's IOMMU is flushed."""
        self.tell_iotlb(3, 0, 0, 0, 0)

    def odd_channel(self) -> None:
        """A back-end channel that is none, or is closed."""
        if self.source.integer(0, 1) and self.channel is not None:
            self.channel.close()
            return
        fds = self.some_fds(2)
        for fd in fds:
            self._forgive(fd)
        self.send(Request.SET_BACKEND_REQ_FD, b"", fds)

    def ring(self) -> int:
        """A ring's number."""
        return self.source.pick((*[0, 1] * 6, 2, 255, 0xFFFFFFFF))

    def configuration(self) -> None:
        """Reads and writes of the configuration space."""
        size = self.source.pick((0, 8, 60, 256))
        offset = self.number(0, 8, 256) & 0xFFFFFFFF
        claimed = self.source.pick((size, size, size + 1))
        payload = struct.pack("<III", offset, claimed, 0) + bytes(size)
        self.send(self.source.pick((Request.GET_CONFIG, Request.SET_CONFIG)), payload)

    def give_inflight(self) -> None:
        """A file for what is in flight: fresh, left behind by another, or of anything."""
        if self._rarely():
            asked = struct.pack("<QQHH4x", 0, 0, self.number(2) & 0xFFFF, self.number(8) & 0xFFFF)
            self.send(Request.GET_INFLIGHT_FD, asked)
        self.spoil_inflight()
        region = region_bytes(_QUEUE_SIZE)
        size, queues = self.number(2 * region, region), self.number(2, 1) & 0xFFFF
        offset, queue_size = self.number(0, 8, 64), self.number(_QUEUE_SIZE, 1, 4) & 0xFFFF
        self.inflight.give(offset, size)
        payload = struct.pack("<QQHH4x", size, offset, queues, queue_size)
        fds = self.some_fds(2) if self._rarely() else [self.inflight.fd]
        for fd in fds:
            self._forgive(fd)
        self.send(Request.SET_INFLIGHT_FD, payload, fds)

    def spoil_inflight(self) -> None:
        """Write into the file of what is in flight."""
        ring = self.source.integer(0, 1) * region_bytes(_QUEUE_SIZE)
        if self.source.integer(0, 1):
            header = [self.number(1, 0), self.number(_QUEUE_SIZE)]
            header += [self.number(0, 1, _QUEUE_SIZE - 1, _QUEUE_SIZE) for _ in range(4)]
            words = struct.pack("<6H", *(word & 0xFFFF for word in header))
            self.inflight.write(ring + 8, words + self.source.blob(2))
        for _ in range(self.source.integer(0, 4)):
            of_packed = self.source.integer(0, 1)
            number = self.source.integer(0, _QUEUE_SIZE - 1)
            place = 32 + 32 * number if of_packed else 16 + 16 * number
            links = (self.number(0, 1, 7, 8) & 0xFFFF for _ in range(3))
            counter = self.number(0, (1 << 64) - 1)
            entry = struct.pack("<BxHHHQ", self.source.integer(0, 1), *links, counter)
            self.inflight.write(ring + place, entry)
            if of_packed:
                address, length, flags, buffer_id = self.fields(_QUEUE_SIZE)
                described = struct.pack("<HHIQ", buffer_id, flags, length, address)
                self.inflight.write(ring + place + 16, described)

    def cut_a_file(self) -> None:
        """A file gets shorter while it is mapped, and perhaps long again."""
        shared = self.source.pick((self.ram, self.ram, self.log, self.inflight))
        whole = len(shared.mine)
        shared.resize(self.source.integer(0, whole))
        if self.source.integer(0, 1):
            self.honest_request()
            self.settle()
        if self.source.integer(0, 1):
            shared.resize(whole)

    def seal(self) -> None:
        """No one may shrink or grow the RAM from now on."""
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(self.ram.fd, fcntl.F_ADD_SEALS, seals)

    def hang_up(self) -> None:
        """The front end goes, in the middle or not."""
        if self.source.integer(0, 1):
            self.send_raw(
                struct.pack("<III", Request.SET_MEM_TABLE, 1, 40)[: self.source.integer(1, 12)]
            )
        self.socket.close()

    def flood(self) -> None:
        """Questions on and on, whose answers nobody reads."""
        data = encode_request(Request.GET_CONFIG, struct.pack("<III", 0, 256, 0) + bytes(256))
        with contextlib.suppress(OSError):
            for _ in range(self.source.integer(1, 600)):
                self.socket.send(data)

    # What a guest does --------------------------------------------------------------------------

    def put(self, gpa: int, data: bytes) -> None:
        """The guest writes its RAM."""
        for start, length, offset in (_LOW, (self.high, _HIGH_BYTES, _HIGH_OFFSET)):
            if start <= gpa and gpa + len(data) <= start + length:
                self.ram.write(offset + gpa - start, data)

    def descriptor(self, entries: int) -> bytes:
        """One descriptor of a split ring, hostile or not."""
        return struct.pack("<QIHH", *self.fields(entries))

    def fields(self, entries: int) -> tuple[int, int, int, int]:
        """Its address, length, flags and what follows."""
        address = self.number(_DATA, _HEADER, _STATUS, _TABLE, self.high, *_RINGS, _LOW[1] - 8)
        length = self.number(16, 1, 512, PAGE, 0xFFFFFFFF, 32 << 20, 0) & 0xFFFFFFFF
        flags = self.source.pick((NEXT, NEXT, WRITE, WRITE | NEXT, 0, INDIRECT, 7, 0xFFFF))
        following = self.source.pick((*range(entries), entries, 0xFFFF))
        return address, length, flags, following

    def honest_request(self) -> None:
        """One that should succeed."""
        ring = self.source.integer(0, self.rings - 1)
        size = self.source.pick((512, PAGE, 3 * PAGE, 100))
        target = self.source.pick((_DATA + self.source.integer(0, PAGE), self.high, *_RINGS))
        if self.device.name == "blk":
            chain = self.disk_request(target, size)
        elif self.device.name == "net" and ring == 1:
            frame = struct.pack("!12x12xHI", ETHERTYPE, self.source.pick((1, 0x01000000)))
            self.put(_HEADER, frame)
            chain = [(_HEADER, len(frame), 0)]
        else:
            chain = [(target, size, WRITE)]
        if self.packed:
            self.publish_packed(ring, [(*part, 0) for part in chain])
            return
        for index, part in enumerate(chain):
            self.put(_RINGS[ring] + 16 * index, struct.pack("<QIHH", *part, index + 1))
        self.publish(ring, [0])

    def disk_request(self, target: int, size: int) -> list[tuple[int, int, int]]:
        """A read, a write or something else of the disk."""
        kind = self.source.pick((0, 0, 1, 4, 8, 77))
        sector = self.number(0, 8, _DISK_BYTES // 512 - 1)
        direction = WRITE if kind in (0, 8) else 0
        self.put(_HEADER, struct.pack("<IIQ", kind, 0, sector))
        return [(_HEADER, 16, NEXT), (target, size, direction | NEXT), (_STATUS, 1, WRITE)]

    def hostile_request(self) -> None:
        """Descriptors in any order, and a head that may not be there."""
        ring = self.source.integer(0, 1)
        count = self.source.integer(1, _QUEUE_SIZE)
        if self.packed:
            self.publish_packed(ring, [self.fields(3) for _ in range(count)])
            return
        for index in range(count):
            self.put(_RINGS[ring] + 16 * index, self.descriptor(_QUEUE_SIZE))
        if self.source.integer(0, 1):
            entries = self.source.integer(1, 12)
            table = b"".join(self.descriptor(entries) for _ in range(entries))
            self.put(_TABLE, table)
            indirect = struct.pack(
                "<QIHH", _TABLE, self.number(len(table)) & 0xFFFFFFFF, INDIRECT, 0
            )
            self.put(_RINGS[ring], indirect)
        heads = [
            self.source.pick((0, 0, 1, _QUEUE_SIZE - 1, _QUEUE_SIZE, 0xFFFF)) for _ in range(2)
        ]
        self.publish(ring, heads)

    def publish_packed(self, ring: int, chain: Sequence[tuple[int, int, int, int]]) -> None:
        """Make a packed ring's descriptors (address, length, flags, ID) available, and kick."""
        for address, length, flags, buffer_id in chain:
            index, second_round = self.position(ring)
            flags = flags & ~(_AVAIL | _USED) | (_USED if second_round else _AVAIL)
            entry = struct.pack("<QIHH", address, length, buffer_id, flags)
            self.put(_RINGS[ring] + 16 * index, entry)
            self.next_available[ring] = (self.next_available[ring] + 1) % (2 * _QUEUE_SIZE)
        wish = struct.pack("<HH", self.source.integer(0, 0xFFFF), self.source.pick((0, 0, 1, 2, 3)))
        self.put(_RINGS[ring] + 16 * _QUEUE_SIZE, wish)
        os.eventfd_write(self.events[ring], 1)

    def publish(self, ring: int, heads: Sequence[int]) -> None:
        """Make requests available and kick."""
        available = _RINGS[ring] + 16 * _QUEUE_SIZE
        for head in heads:
            place = available + 4 + 2 * (self.next_available[ring] % _QUEUE_SIZE)
            self.put(place, struct.pack("<H", head))
            self.next_available[ring] = (self.next_available[ring] + 1) & 0xFFFF
        self.put(
            available, struct.pack("<HH", self.source.pick((0, 0, 1)), self.next_available[ring])
        )
        self.put(available + 4 + 2 * _QUEUE_SIZE, struct.pack("<H", self.source.integer(0, 0xFFFF)))
        os.eventfd_write(self.events[ring], 1)

    def jump(self) -> None:
        """The available index goes anywhere."""
        ring = self.source.integer(0, 1)
        self.next_available[ring] = self.source.integer(0, 0xFFFF)
        if self.packed:
            self.publish_packed(ring, [])
        else:
            self.publish(ring, [])

    def scribble(self) -> None:
        """Anything anywhere in the rings."""
        place = self.source.pick((*_RINGS, _RINGS[0] + PAGE, _TABLE))
        self.put(place + self.source.integer(0, 512), self.source.blob(64))

    def fill_the_call(self) -> None:
        """The interrupts' counter is full, so that a write to it may block."""
        os.set_blocking(self.events[2], False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.events[2], (1 << 64) - 2)
        for event in self.events:
            os.set_blocking(event, bool(self.source.integer(0, 1)))

    def take_the_log(self) -> None:
        """QEMU's sync."""
        self.log.write(_LOG_OFFSET, bytes(self.log_bytes))


def _device(name: str) -> VirtioDevice:
    # A small disk, whose end is near.
    if name == "blk":
        return emulated_devices()[name](capacity_bytes=_DISK_BYTES, queues=2)  # type: ignore[call-arg]
    return emulated_devices()[name]()


def _reopened(flags: int) -> Callable[[_Peer], int]:
    return lambda peer: os.open(f"/proc/self/fd/{peer.ram.fd}", flags)


def _sized(size: int, flags: int = 0) -> Callable[[_Peer], int]:
    def make(peer: _Peer) -> int:
        fd = os.memfd_create("hostile-odd", flags | os.MFD_CLOEXEC)
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        return fd

    return make


def _one_end_of_a_pipe(peer: _Peer) -> int:
    ends = list(os.pipe())
    kept = ends.pop(peer.source.integer(0, 1))
    os.close(ends[0])
    return kept


def _epoll(peer: _Peer) -> int:
    epoll = select.epoll()
    fd = os.dup(epoll.fileno())
    epoll.close()
    return fd


_KINDS: Final[tuple[Callable[[_Peer], int], ...]] = (
    lambda peer: os.dup(peer.events[peer.source.integer(0, 2)]),
    lambda peer: os.dup(peer.ram.fd),
    lambda peer: os.dup(peer.log.fd),
    lambda peer: os.dup(peer.socket.fileno()) if peer.socket.fileno() >= 0 else os.eventfd(0),
    _reopened(os.O_RDONLY),
    _reopened(os.O_PATH),
    _sized(0),
    _sized(1 << 24),
    _sized(1 << 48),
    _sized((1 << 63) - 1),
    _sized(2 << 20, os.MFD_HUGETLB),
    _one_end_of_a_pipe,
    _epoll,
    lambda peer: os.open("/", os.O_RDONLY),
    lambda peer: os.open("/dev/zero", os.O_RDWR),
    lambda peer: os.open("/dev/null", os.O_RDWR),
)

_STATES: Final = (
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
)

_LIKELY_STATES: Final = {
    Request.SET_VRING_NUM: (_QUEUE_SIZE, 0, 1, 2, 32768, 65536, 3),
    Request.SET_VRING_BASE: (0, 0x8000_8000, 5, 0xFFFF, 0x10000),
    Request.GET_VRING_BASE: (0,),
    Request.SET_VRING_ENABLE: (1, 0, 2),
}

_WEIGHTS: Final[dict[Callable[[_Peer], None], int]] = {
    _Peer.honest_request: 6,
    _Peer.hostile_request: 6,
    _Peer.ring_state: 3,
    _Peer.ring_address: 3,
    _Peer.restart: 3,
    _Peer.start_logging: 3,
    _Peer.boot: 2,
    _Peer.set_features: 2,
    _Peer.memory_table: 2,
    _Peer.memory_of_odd_files: 1,
    _Peer.odd_log: 2,
    _Peer.give_inflight: 3,
    _Peer.spoil_inflight: 2,
    _Peer.event_fds: 2,
    _Peer.jump: 1,
    _Peer.scribble: 2,
    _Peer.take_the_log: 1,
    _Peer.cut_a_file: 2,
    _Peer.seal: 1,
    _Peer.any_mapping: 3,
    _Peer.everything_unmapped: 1,
    _Peer.odd_channel: 1,
    _Peer.configuration: 1,
    _Peer.any_message: 1,
    _Peer.part_of_a_message: 1,
    _Peer.fill_the_call: 1,
    _Peer.flood: 1,
    _Peer.hang_up: 1,
}
_STEPS_BY_WEIGHT: Final = tuple(step for step, weight in _WEIGHTS.items() for _ in range(weight))
