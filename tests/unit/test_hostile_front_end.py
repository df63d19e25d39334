"""Front ends that misuse files, sizes and turns: they are refused, and nothing leaks."""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dmaproof.devices.blk import Blk
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.dma import Dma
from dmaproof.errors import ProtocolError
from dmaproof.vhost_user.features import PROTOCOL_FEATURES
from dmaproof.vhost_user.messages import HEADER_BYTES, Request, encode_request, encode_u64
from dmaproof.vhost_user.server import Server
from dmaproof.virtqueue import DescriptorChain
from qmp_tools.testbed import front_end as testbed
from qmp_tools.testbed.ring_driver import (
    HVA_BASE,
    PAGE,
    WRITE,
    Buffer,
    RingDriver,
    guest_memory,
    ram_fd,
)
from support.front_end import FEATURES, FrontEnd
from support.host_pages import HOST_PAGE

RAM_BYTES = 32 * PAGE
LOG_BYTES = 8
RING, HEADER, STATUS, DATA = 2 * PAGE, 6 * PAGE, 7 * PAGE, 24 * PAGE


def mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:guest-ram")


@pytest.fixture
def ram() -> Iterator[int]:
    with ram_fd(RAM_BYTES) as fd:
        yield fd


@pytest.fixture
def front_end() -> Iterator[FrontEnd]:
    before = mapped()
    front_end = FrontEnd()
    front_end.send(Request.SET_FEATURES, encode_u64(FEATURES))
    front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
    yield front_end
    front_end.close()
    assert mapped() == before


def table(*regions: tuple[int, int, int]) -> bytes:
    """Return the payload of SET_MEM_TABLE for regions (GPA, length, file offset)."""
    packed = b"".join(
        struct.pack("<QQQQ", gpa, length, HVA_BASE + gpa, offset) for gpa, length, offset in regions
    )
    return struct.pack("<II", len(regions), 0) + packed


def a_pipe() -> int:
    ends = os.pipe()
    os.close(ends[0])
    return ends[1]


def an_epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: os.memfd_create("data"), "memfd:data"),
        (lambda: os.open("/", os.O_RDONLY), "is /, not an eventfd"),
        (a_pipe, "pipe:"),
        (an_epoll, "eventpoll"),
    ],
)
def test_a_kick_or_call_that_is_not_an_eventfd_is_refused(
    front_end: FrontEnd, request_: Request, make: Callable[[], int], kind: str
) -> None:
    fd = make()
    with pytest.raises(ProtocolError, match=f"{request_.name}.*{kind}"):
        front_end.send(request_, encode_u64(0), [fd])
    os.close(fd)


@pytest.mark.parametrize("request_", [Request.SET_MEM_TABLE, Request.SET_LOG_BASE])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_a_file_that_cannot_be_mapped_is_refused(
    front_end: FrontEnd, ram: int, request_: Request, flags: int
) -> None:
    fd = os.open(f"/proc/self/fd/{ram}", flags)
    payload = table((0, PAGE, 0)) if request_ is Request.SET_MEM_TABLE else struct.pack("<QQ", 8, 0)
    with pytest.raises(ProtocolError, match=f"{request_.name}.* cannot be mapped"):
        front_end.send(request_, payload, [fd])
    os.close(fd)


@pytest.mark.parametrize(("gpa", "length"), [(0, PAGE + 512), (512, PAGE), (0, 100)])
def test_a_slot_of_partial_pages_is_refused(
    front_end: FrontEnd, ram: int, gpa: int, length: int
) -> None:
    with pytest.raises(ProtocolError, match="expected whole pages"):
        front_end.send(Request.SET_MEM_TABLE, table((gpa, length, 0)), [ram])


def test_more_memory_than_can_be_tracked_is_refused(front_end: FrontEnd) -> None:
    with ram_fd(1 << 41) as sparse, pytest.raises(ProtocolError, match="can be tracked"):
        front_end.send(Request.SET_MEM_TABLE, table((0, (1 << 40) + PAGE, 0)), [sparse])


def test_1_tib_of_memory_is_accepted(front_end: FrontEnd) -> None:
    with ram_fd(1 << 40) as sparse:
        front_end.send(Request.SET_MEM_TABLE, table((0, 1 << 40, 0)), [sparse])
    assert front_end.session.memory.end == 1 << 40


def test_endless_messages_do_not_block_other_sessions(front_end: FrontEnd) -> None:
    question = encode_request(Request.GET_FEATURES)
    front_end.socket.sendall(question * 200)
    front_end.session.receive()
    answers = len(front_end.socket.recv(1 << 16)) // (HEADER_BYTES + 8)
    assert 0 < answers < 100
    for _ in range(200):
        front_end.session.receive()
    assert len(front_end.socket.recv(1 << 16)) // (HEADER_BYTES + 8) == 200 - answers


# Truncated files --------------------------------------------------------------------------------


class Peer(testbed.FrontEnd):
    """A front end of a server that runs in this thread."""

    def __init__(self, server: Server) -> None:
        front_end_socket, server_socket = socket.socketpair()
        super().__init__(front_end_socket)
        self._server = server
        server.adopt(str(front_end_socket.fileno()), server_socket)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are and let the server have a turn."""
        super().send_raw(data, fds)
        self._server.turn(0)


def boot(front_end: testbed.FrontEnd, ram: int) -> RingDriver:
    front_end.set_memory(ram, (0, RAM_BYTES, 0))
    driver = RingDriver(guest_memory(ram, (0, RAM_BYTES, 0)), RING)
    front_end.start_ring(driver)
    driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    driver.describe(
        driver.chain([Buffer(HEADER, 16), Buffer(DATA, PAGE, WRITE), Buffer(STATUS, 1, WRITE)])
    )
    return driver


@pytest.mark.timeout(600)
def test_a_full_eventfd_does_not_block_the_device(front_end: FrontEnd, ram: int) -> None:
    driver = boot(front_end, ram)
    os.eventfd_read(front_end.call)
    os.eventfd_write(front_end.call, (1 << 64) - 2)  # the counter is full
    os.set_blocking(front_end.call, True)
    driver.write(STATUS, b"\xff")
    driver.publish(0)
    front_end.serve()
    assert driver.read(STATUS, 1) == b"\0"


class SlowBlk(Blk):
    """A disk on which each request takes longer than a turn may."""

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """See `VirtioDevice.process`."""
        time.sleep(0.1)
        return super().process(chain, dma)


def test_slow_requests_do_not_block_other_sessions(ram: int) -> None:
    device = SlowBlk(1 << 30, queues=1)
    front_end = FrontEnd(device)
    front_end.send(Request.SET_FEATURES, encode_u64(FEATURES))
    driver = boot(front_end, ram)
    driver.publish(0, 0, 0)
    for served in (1, 2, 3):
        assert front_end.session.serve_rings()
        assert device.requests == served
    assert not front_end.session.serve_rings()
    front_end.close()


@pytest.mark.parametrize("remaining", [0, DATA - DATA % HOST_PAGE])
def test_truncated_ram_is_refused(front_end: FrontEnd, ram: int, remaining: int) -> None:
    driver = boot(front_end, ram)
    driver.publish(0)
    os.ftruncate(ram, remaining)
    with pytest.raises(ProtocolError, match=r"slot GPA 0x0 .* truncated"):
        front_end.serve()


def test_a_truncated_log_ends_only_one_session(ram: int) -> None:
    control, server_end = socket.socketpair()
    server = Server(
        Blk(1 << 30, queues=1),
        emulated_trackers()["iommu"],
        server_end,
        harvest_interval_s=1e-9,
        immediate=False,
    )
    good, bad = Peer(server), Peer(server)
    with ram_fd(LOG_BYTES) as log:
        bad.send(Request.SET_FEATURES, encode_u64(FEATURES))
        driver = boot(bad, ram)
        bad.set_log(log, LOG_BYTES)
        bad.log_all(True)
        os.ftruncate(log, 0)
        driver.publish(0)
        os.eventfd_write(bad.kick, 1)
        for _ in range(4):
            server.turn(0)
    events = [json.loads(line) for line in control.recv(1 << 16).splitlines()]
    assert [event["message"] for event in events if event["event"] == "refused"] == [
        "dirty log: its file was truncated while it was in use"
    ]
    assert good.ask(Request.GET_FEATURES)
    server.close()
    for closed in (good, bad, control):
        closed.close()
