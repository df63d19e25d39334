"""The network whose other end sends every frame back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmaproof.devices.echo import Echo
from dmaproof.errors import ProtocolError
from qmp_tools.devices.emulated import EmulatedDevice
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.guest.workload import Workload
from support.network_guest import NetworkGuest as Guest
from support.network_guest import network_guest

HEADER = bytes(10) + b"\1\0"  # struct virtio_net_hdr: one buffer
FRAME = bytes(range(256)) * 5


@pytest.fixture
def guest() -> Iterator[Guest]:
    with network_guest(Echo()) as guest:
        yield guest


def test_each_frame_comes_back_in_order(guest: Guest) -> None:
    guest.offer(3)
    for frame in (FRAME, b"short"):
        guest.send(frame)
    assert guest.received() == [HEADER + FRAME, HEADER + b"short"]


def test_frames_wait_for_a_buffer(guest: Guest) -> None:
    guest.send(FRAME)
    assert guest.received() == []
    guest.offer(1)
    assert guest.received() == [HEADER + FRAME]


def test_a_guest_that_offers_no_buffer_cannot_fill_the_devices_memory(guest: Guest) -> None:
    sent = 0
    while guest.transmit.collect() or not sent:  # each frame is taken, until the device is full
        guest.send(FRAME)
        sent += 1
        assert sent < 1000
    assert not guest.front_end.session.serve_rings()  # nor does the full device keep trying
    guest.offer(2)
    assert guest.received() == [HEADER + FRAME] * 2
    assert guest.transmit.collect()  # the frame that had waited


def test_a_buffer_too_small_for_a_frame_is_refused(guest: Guest) -> None:
    guest.offer(1, length=len(HEADER + FRAME) - 1)
    with pytest.raises(ProtocolError, match="shorter than 1292 bytes"):
        guest.send(FRAME)


def test_the_workload_runs_on_the_network_and_its_pages_are_copies() -> None:
    device = EmulatedDevice(DeviceOptions("echo"))
    assert device.has_workload
    assert not device.direct
    workload = device.adapt(Workload())
    assert (workload.write_every, workload.huge_every, workload.unaligned_every) == (0, 0, 0)
    disk = EmulatedDevice(DeviceOptions("blk"))
    assert disk.direct
    assert disk.adapt(Workload()) == Workload()
