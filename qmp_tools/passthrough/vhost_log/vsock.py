"""vhost-vsock: this process is the guest's driver, and with its sockets also the host's program.

The device writes each packet for the guest to a buffer of the receive ring, in
vhost_transport_do_send_pkt() (drivers/vhost/vsock.c). It reads the guest's packets in the other
ring, and writes nothing there but the used ring.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Self

from dmaproof.units import PAGE_BYTES

from ..outcome import Proof, require, require_defect
from .abi import U64, Feature, Ioctl
from .device import VhostDevice, wait_until
from .memory import Comparison, GuestMemory, Region
from .net_proofs import require_cleared_bit_shows
from .ring import Buffer, Layout, Ring, used_bytes_before

PATH: Final = "/dev/vhost-vsock"
_RECEIVE: Final = 0
_SEND: Final = 1
_RUNNING: Final = struct.Struct("=i")
_HEADER: Final = struct.Struct("<QQIIIHHIII")
"""struct virtio_vsock_hdr (virtio 1.2, 5.10.6): CIDs, ports, length, type, operation, credit."""
_STREAM: Final = 1
_REQUEST: Final = 1
_RESPONSE: Final = 2
_CREDIT: Final = 1 << 20
_HOST_CID: Final = 2
_GUEST_CID: Final = 0x64_6D_61
_PORT: Final = 1234
_SIZE: Final = 64
_CONNECT_TIMEOUT: Final = 6
"""SO_VM_SOCKETS_CONNECT_TIMEOUT in linux/vm_sockets.h; two seconds are not enough under TCG."""
_REGIONS: Final = (Region(16, 16), Region(32, 96))
_RING_PAGES: Final = {_RECEIVE: 16, _SEND: 22}
"""The pages of each ring: descriptors, avail and used ring one after the other, and tables."""
_TABLE_PAGE: Final = 28
_PACKET_PAGE: Final = 33
"""The page with the guest's packet."""
_BUFFER_PAGE: Final = 34
_BUFFER_PAGES: Final = 90
_MOST_PARTS: Final = 4
_ROOM: Final = 60_000
"""More than the data of a round needs, with its headers."""
_ROUNDS: Final = 3
_MOST_DATA: Final = 20_000


class Guest:
    """The driver of a vhost-vsock device, and a connection to it from the host."""

    def __init__(
        self, choose: random.Random, features: Iterable[Feature], timeout_s: float, *, iotlb: bool
    ) -> None:
        """Open the device with two rings; each used ring crosses a page border.

        With an IOTLB no entry crosses the border, since the kernel does not log all of such an
        entry (`net_findings.split_write_is_lost`).
        """
        self.memory = GuestMemory(_REGIONS, choose, iotlb=iotlb)
        self._choose = choose
        self._timeout_s = timeout_s
        self.rings: dict[int, Ring] = {}
        for index, page in _RING_PAGES.items():
            odd = 0 if iotlb else choose.choice((0, 4))
            used = self.memory.bus(page + 3) - used_bytes_before(choose.randrange(_SIZE)) - odd
            layout = Layout(
                _SIZE,
                self.memory.bus(page),
                self.memory.bus(page + 1),
                used,
                self.memory.bus(_TABLE_PAGE),
            )
            self.rings[index] = Ring(self.memory, layout, choose.randrange(65536))
        self._receive = self.rings[_RECEIVE]
        self._vhost = VhostDevice(PATH, self.memory, features)
        self._chains: deque[list[Buffer]] = deque()
        with contextlib.ExitStack() as stack:
            stack.callback(self._vhost.close)
            for index, ring in self.rings.items():
                self._vhost.add_ring(index, ring)
            self._vhost.request(Ioctl.VSOCK_SET_GUEST_CID, U64.pack(_GUEST_CID))
            self.socket = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            self.socket.setblocking(False)
            _set_connect_timeout(self.socket, timeout_s)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def fill(self, *, indirect: bool) -> None:
        """Make buffers available, until the ring is full or there is room for all data."""
        while self._receive.free >= _MOST_PARTS and sum(self._receive.capacities) < _ROOM:
            lengths = [self._choose.randrange(1, 3000) for _ in range(_MOST_PARTS - 1)]
            chain = [
                Buffer(
                    self.memory.bus(_BUFFER_PAGE)
                    + self._choose.randrange(_BUFFER_PAGES * PAGE_BYTES - length),
                    length,
                )
                for length in (_HEADER.size, *lengths)
            ]
            self._receive.add(chain, indirect=indirect and self._choose.random() < 0.5)
            self._chains.append(chain)

    def connect(self) -> tuple[Comparison, int]:
        """Connect from the host; return also the host's port, which the packet has."""
        comparison = self._run(
            lambda: self.socket.connect_ex((_GUEST_CID, _PORT)),
            lambda: self._receive.used() > 0,
            "written the packet that asks for a connection",
        )
        header = self.memory.read(self._chains[0][0].bus, _HEADER.size)
        _, _, port, _, _, _, operation, _, _, _ = _HEADER.unpack(header)
        require(operation == _REQUEST, f"the packet's operation is {operation}")
        self._reclaim()
        return comparison, port

    def accept(self, port: int) -> Comparison:
        """Send the guest's answer to the host, which is then connected."""
        packet = _HEADER.pack(
            *(_GUEST_CID, _HOST_CID, _PORT, port),
            *(0, _STREAM, _RESPONSE, 0, _CREDIT, 0),
        )
        place = self.memory.bus(_PACKET_PAGE)
        self.memory.write(place, packet)
        self.rings[_SEND].add([Buffer(place, len(packet), writable=False)])
        comparison = self._run(
            lambda: self._vhost.kick(_SEND), self._is_connected, "passed on the guest's answer"
        )
        self.rings[_SEND].reclaim()
        return comparison

    def _is_connected(self) -> bool:
        return bool(self.rings[_SEND].used()) and bool(select.select([], [self.socket], [], 0)[1])

    def receive(self, data: bytes) -> Comparison:
        """Send data from the host, and wait until all of it is in the guest's buffers."""
        sent = 0

        def send() -> None:
            nonlocal sent
            sent = self.socket.send(data)

        def has_all() -> bool:
            return sum(self._receive.used_lengths()) >= (sent + self._receive.used() * _HEADER.size)

        comparison = self._run(send, has_all, "written all data")
        self._reclaim()
        return comparison

    def _reclaim(self) -> None:
        for _ in range(self._receive.used()):
            self._chains.popleft()
        self._receive.reclaim()

    def _run(self, begin: Callable[[], object], done: Callable[[], bool], what: str) -> Comparison:
        """Start the device, `begin`, wait until it is `done`, and stop the device."""
        self.memory.snapshot()
        self._vhost.request(Ioctl.VSOCK_SET_RUNNING, _RUNNING.pack(1))
        try:
            begin()
            wait_until(done, what, self._timeout_s)
        finally:
            # This waits for the rings' mutexes, which the device holds until it has logged all.
            self._vhost.request(Ioctl.VSOCK_SET_RUNNING, _RUNNING.pack(0))
        return self.memory.compare()

    def ring_pages(self) -> frozenset[int]:
        """Return the guest pages of the rings."""
        first = self.memory.bus(_REGIONS[0].page)
        return self.memory.guest_pages(first, (_TABLE_PAGE - _REGIONS[0].page) * PAGE_BYTES)


def _set_connect_timeout(vsock: socket.socket, timeout_s: float) -> None:
    """Set the timeout by a call of the C library: Python gives such sockets integers only."""
    libc = ctypes.CDLL(None, use_errno=True)
    value = struct.pack("ll", int(timeout_s), 0)  # struct timeval
    if libc.setsockopt(vsock.fileno(), socket.AF_VSOCK, _CONNECT_TIMEOUT, value, len(value)):
        raise OSError(ctypes.get_errno(), "SO_VM_SOCKETS_CONNECT_TIMEOUT")


def _rounds(seed: int, timeout_s: float, *, iotlb: bool) -> list[tuple[Comparison, frozenset[int]]]:
    """Let the device receive; return each comparison, and the guest pages of the rings."""
    choose = random.Random(seed)
    features = {Feature.LOG_ALL, Feature.INDIRECT}
    if choose.random() < 0.5:
        features.add(Feature.EVENT_INDEX)
    with Guest(choose, features, timeout_s, iotlb=iotlb) as guest:
        guest.fill(indirect=True)
        first, port = guest.connect()
        found = [first, guest.accept(port)]
        for _ in range(_ROUNDS):
            guest.fill(indirect=True)
            found.append(guest.receive(choose.randbytes(choose.randrange(1, _MOST_DATA))))
        rings = guest.ring_pages()
    return [(comparison, rings) for comparison in found]


def buffers_are_lost(seed: int, timeout_s: float, *, iotlb: bool) -> tuple[str, dict[str, Any]]:
    """Observe that no received buffer's page has its bit."""
    rounds = _rounds(seed, timeout_s, iotlb=iotlb)
    lost = sum(len(found.lost) for found, _ in rounds)
    written = sum(len(found.changed - rings) for found, rings in rounds)
    require(written > 0, "the device wrote no buffer")
    require_defect(
        all(found.lost == found.changed - rings for found, rings in rounds),
        lost == 0,
        f"{lost} of {written} pages of buffers have no bit",
    )
    return (
        f"{len(rounds)} rounds: all {lost} changed pages of buffers have no bit",
        {"rounds": len(rounds), "lost": lost, "pages": written, "seed": seed},
    )


def rings_are_logged(seed: int, timeout_s: float, *, iotlb: bool) -> tuple[str, dict[str, Any]]:
    """Require the bit of each page of the used rings that changed."""
    rounds = _rounds(seed, timeout_s, iotlb=iotlb)
    choose = random.Random(seed)
    for found, rings in rounds:
        lost = found.lost & rings
        require(not lost, f"seed {seed}: pages of used rings are lost: {sorted(lost)}")
        require_cleared_bit_shows(found, choose)
    pages = sum(len(found.changed & rings) for found, rings in rounds)
    require(pages > 0, "the device wrote no used ring")
    return (
        f"{len(rounds)} rounds: all {pages} changed pages of used rings have their bit",
        {"rounds": len(rounds), "pages": pages, "lost": 0, "seed": seed},
    )


def vsock_proofs(seed: int, timeout_s: float) -> dict[str, Proof]:
    """Return the proofs with vhost-vsock by name."""
    found: dict[str, Proof] = {}
    for iotlb in (False, True):
        suffix = ", IOTLB" if iotlb else ""
        found |= {
            f"vsock: received buffers are not logged{suffix}": partial(
                buffers_are_lost, seed, timeout_s, iotlb=iotlb
            ),
            f"vsock: the used rings are logged{suffix}": partial(
                rings_are_logged, seed, timeout_s, iotlb=iotlb
            ),
        }
    return found
