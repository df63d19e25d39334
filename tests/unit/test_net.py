"""The network and entropy devices with drivers that follow the specification or break it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from dmaproof.devices.net import ETHERTYPE, PAYLOAD_BYTES, Net
from dmaproof.devices.rng import Rng
from dmaproof.errors import ProtocolError
from dmaproof.stamp import stamped_page
from dmaproof.vhost_user.messages import Request, encode_u64
from qmp_tools.testbed.ring_driver import PAGE, WRITE, Buffer, RingDriver, guest_memory, ram_fd
from support.front_end import FEATURES, FrontEnd
from support.network_guest import DATA, OFFERED, RAM_BYTES, RECEIVE, network_guest
from support.network_guest import NetworkGuest as Guest

FRAME_BYTES = 12 + 14 + PAYLOAD_BYTES


@pytest.fixture
def guest() -> Iterator[Guest]:
    with network_guest(Net()) as guest:
        yield guest


def _frame(ethertype: int, content: bytes) -> bytes:
    return b"\xff" * 6 + b"\x52" * 6 + struct.pack("!H", ethertype) + content


def test_the_device_sends_the_requested_number_of_packets(guest: Guest) -> None:
    guest.offer(6)
    assert guest.received() == []
    guest.send(_frame(ETHERTYPE, struct.pack("<I", 2)))
    assert guest.transmit.collect() == [(0, 0)]
    for number, packet in enumerate(guest.received(), 2):  # request 1 was the guest's frame
        assert len(packet) == FRAME_BYTES
        assert packet[:12] == bytes(10) + b"\1\0"  # struct virtio_net_hdr: one buffer
        assert packet[24:26] == b"\x88\xb5"
        assert packet[26:] == stamped_page(0, number)[:PAYLOAD_BYTES]
    guest.send(_frame(ETHERTYPE, struct.pack("<I", 9)))
    assert len(guest.received()) == 4, "the guest offered only 6 buffers"
    guest.offer(8)
    assert len(guest.received()) == 5, "5 of the packets are still outstanding"


@pytest.mark.parametrize(
    ("ethertype", "content"),
    [(0x0806, struct.pack("<I", 2)), (ETHERTYPE, b"\2"), (ETHERTYPE, b"")],
)
def test_frames_without_a_request_are_ignored(guest: Guest, ethertype: int, content: bytes) -> None:
    guest.offer(2)
    guest.send(_frame(ethertype, content))
    assert guest.transmit.collect() == [(0, 0)]
    assert guest.received() == []


def test_a_buffer_too_small_for_a_packet_is_refused(guest: Guest) -> None:
    guest.offer(1, length=FRAME_BYTES - 1)
    with pytest.raises(ProtocolError, match="shorter than 1522 bytes"):
        guest.send(_frame(ETHERTYPE, struct.pack("<I", 1)))


def test_a_ring_of_unused_buffers_does_not_keep_the_server_busy(guest: Guest) -> None:
    guest.offer(2)
    assert not guest.front_end.session.serve_rings()


def test_entropy_fills_every_writable_byte() -> None:
    front_end = FrontEnd(Rng())
    with ram_fd(RAM_BYTES) as ram:
        driver = RingDriver(guest_memory(ram, (0, RAM_BYTES, 0)), RECEIVE)
        front_end.send(Request.SET_FEATURES, encode_u64(FEATURES))
        front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(OFFERED))
        front_end.set_memory(ram, (0, RAM_BYTES, 0))
        front_end.start_ring(driver)
        for _ in range(2):
            driver.submit([Buffer(DATA, 100, WRITE), Buffer(DATA + PAGE, 3, WRITE)])
            front_end.serve()
        assert driver.collect() == [(0, 103), (2, 103)]
        assert len(set(driver.read(DATA, 100))) > 30
        assert driver.read(DATA + 100, 1) == b"\0"
        front_end.close()
