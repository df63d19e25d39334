"""A virtio network device (virtio 1.2, section 5.1) whose other end is a generator of packets.

A frame of our EtherType that the guest sends asks for packets: 4 bytes, how many. Each that comes
back is a frame of full length whose payload is the beginning of a stamped page (see
`dmaproof.stamp`): its LBA is 0, its request number that of the packet. So a packet tells by itself
whether it is whole and newer than the one before. Whatever else the guest sends is let go.

The receive path is where such a device does its DMA: buffers lie in the ring long before there is
anything to be put into them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import ClassVar, Final

from ..dma import Dma
from ..errors import ProtocolError
from ..stamp import stamped_page
from ..virtqueue import DescriptorChain
from .device import VirtioDevice
from .segments import gather, scatter, take

_HEADER: Final = struct.Struct("<BBHHHHH")
"""struct virtio_net_hdr with num_buffers, which VIRTIO_F_VERSION_1 makes part of it."""
ETHERTYPE: Final = 0x88B5
"""IEEE 802's for local experiments."""
_ETHERNET: Final = struct.Struct("!6s6sH")
_BROADCAST, _SENDER = b"\xff" * 6, b"\x02dmapr"
PAYLOAD_BYTES: Final = 1496
"""Whole words of a stamp, in a frame of the usual size."""
_RECEIVE: Final = 0
"""The queue of packets for the guest; the other one is of those that it sends."""
_MOST_AT_A_TIME: Final = 1 << 10


class Net(VirtioDevice):
    """A network device with one pair of virtqueues; QEMU answers for its configuration."""

    name: ClassVar[str] = "net"
    linux: ClassVar[tuple[Sequence[str], str]] = (
        ("virtio_pci", "virtio_net", "af_packet"),
        "packets=eth0",
    )
    queues = 2

    def __init__(self) -> None:
        self._asked_for = 0

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        """One pair of queues at any time, and no interrupt vectors.

        With them QEMU 7.2 ends by SIGSEGV under TCG when the guest's
        driver unmasks one (kvm_virtio_pci_irqfd_use, though there is no KVM).
        """
        device = (f"virtio-net-pci,netdev=net-{chardev}", "vectors=0", "romfile=")
        return [
            *("-netdev", f"vhost-user,id=net-{chardev},chardev={chardev}"),
            *("-device", ",".join((*device, *properties))),
        ]

    def is_ready(self, queue: int) -> bool:
        """Packets come only if they were asked for."""
        return queue != _RECEIVE or self._asked_for > 0

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        self.begin_request(dma)
        if dma.journal.queue == _RECEIVE:
            return self._receive(chain, dma)
        frame = gather(take(chain.readable, _HEADER.size, _ETHERNET.size + 4), dma)
        if len(frame) == _ETHERNET.size + 4 and _ETHERNET.unpack_from(frame)[2] == ETHERTYPE:
            (count,) = struct.unpack_from("<I", frame, _ETHERNET.size)
            self._asked_for = min(self._asked_for + count, _MOST_AT_A_TIME)
        return 0

    def _receive(self, chain: DescriptorChain, dma: Dma) -> int:
        self._asked_for -= 1
        packet = (
            _HEADER.pack(0, 0, 0, 0, 0, 0, 1)
            + _ETHERNET.pack(_BROADCAST, _SENDER, ETHERTYPE)
            + stamped_page(0, self.requests)[:PAYLOAD_BYTES]
        )
        if sum(length for _, length in chain.writable) < len(packet):
            raise ProtocolError(
                f"receive buffer of packet {self.requests}: it has no room for {len(packet)} bytes"
            )
        return scatter(packet, chain.writable, dma)
