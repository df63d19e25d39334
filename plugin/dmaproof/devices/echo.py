"""A virtio network device (virtio 1.2, section 5.1) whose other end sends every frame back.

The guest's workload runs over it: the guest stamps each page itself, sends it in frames, and puts
the page together again from the frames that the device has written into the buffers of the guest's
kernel. So a network card carries a proof where QEMU offers no other vhost-user device, as on
s390x.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import ClassVar, Final

from ..dma import Dma
from ..errors import ProtocolError
from ..virtqueue import DescriptorChain
from .device import VirtioDevice
from .net import HEADER, PLAIN_HEADER, RECEIVE, network_card
from .segments import gather, scatter, take

_MOST_FRAMES: Final = 256
"""The most frames between the two queues: as many as a queue of QEMU's network card has."""


class Echo(VirtioDevice):
    """A network card with one pair of virtqueues; every frame comes back."""

    name: ClassVar[str] = "echo"
    guests: ClassVar[Collection[str]] = ("bare", "linux")
    linux: ClassVar[tuple[Sequence[str], str]] = (
        ("virtio_pci", "virtio_net", "af_packet"),
        "loop=eth0",
    )
    has_workload: ClassVar[bool] = True
    is_network: ClassVar[bool] = True
    queues = 2

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        return network_card(chardev, properties)

    def is_ready(self, queue: int) -> bool:
        """Return whether the receive queue has a frame to deliver, or the other queue space."""
        return bool(self._frames) if queue == RECEIVE else len(self._frames) < _MOST_FRAMES

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        self.begin_request(dma)
        if dma.journal.queue == RECEIVE:
            return self._deliver(self._frames.popleft(), chain, dma)
        self._frames.append(gather(take(chain.readable, HEADER.size, None), dma))
        return 0

    def _deliver(self, frame: bytes, chain: DescriptorChain, dma: Dma) -> int:
        packet = PLAIN_HEADER + frame
        if sum(length for _, length in chain.writable) < len(packet):
            raise ProtocolError(
                f"receive buffer of frame {self.requests} is shorter than {len(packet)} bytes"
            )
        return scatter(packet, chain.writable, dma)
