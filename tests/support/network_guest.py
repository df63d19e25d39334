"""A guest's network driver that talks to a vhost-user network device in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from dmaproof.devices.device import VirtioDevice
from dmaproof.vhost_user.features import PROTOCOL_FEATURES
from dmaproof.vhost_user.messages import ProtocolFeature, Request, encode_u64
from qmp_tools.testbed.ring_driver import PAGE, WRITE, Buffer, RingDriver, guest_memory, ram_fd
from support.front_end import FEATURES, FrontEnd

OFFERED: Final = PROTOCOL_FEATURES & ~ProtocolFeature.CONFIG
RAM_BYTES: Final = 1024 * PAGE
RECEIVE, TRANSMIT = 8 * PAGE, 16 * PAGE
"""The guest physical addresses of the two rings."""
DATA, SENT = 512 * PAGE, 100 * PAGE
"""Those of the buffers for frames that arrive, and of the frame that is sent."""
HEADER_BYTES: Final = 12
"""The size of struct virtio_net_hdr."""


class NetworkGuest(NamedTuple):
    """A driver for each ring of a network device."""

    front_end: FrontEnd
    receive: RingDriver
    transmit: RingDriver

    def send(self, frame: bytes) -> None:
        """Send a frame, with its header in a descriptor of its own."""
        self.transmit.write(SENT, bytes(HEADER_BYTES) + frame)
        self.transmit.submit([Buffer(SENT, HEADER_BYTES), Buffer(SENT + HEADER_BYTES, len(frame))])
        self.front_end.serve()

    def offer(self, count: int, length: int = PAGE) -> None:
        """Offer `count` buffers of `length` bytes for frames that arrive."""
        for number in range(count):
            self.receive.submit([Buffer(DATA + number * PAGE, length, WRITE)])
        self.front_end.serve()

    def received(self) -> list[bytes]:
        """Return the frames that have arrived since the last call, with their headers."""
        return [
            self.receive.read(DATA + head * PAGE, written)
            for head, written in self.receive.collect()
        ]


@contextmanager
def network_guest(device: VirtioDevice) -> Iterator[NetworkGuest]:
    """Connect a guest to a network `device`."""
    front_end = FrontEnd(device)
    with ram_fd(RAM_BYTES) as ram:
        memory = guest_memory(ram, (0, RAM_BYTES, 0))
        drivers = [RingDriver(memory, base) for base in (RECEIVE, TRANSMIT)]
        front_end.send(Request.SET_FEATURES, encode_u64(FEATURES))
        front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(OFFERED))
        front_end.set_memory(ram, (0, RAM_BYTES, 0))
        for index, driver in enumerate(drivers):
            front_end.start_ring(driver, index)
        yield NetworkGuest(front_end, *drivers)
        front_end.close()
