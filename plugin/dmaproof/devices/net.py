"""A virtio network device (virtio 1.2, section 5.1) whose other end generates packets.

The guest asks for packets with a frame of EtherType 0x88b5, whose payload is the number of packets
(4 bytes). Each packet is a frame of full length. Its payload is the beginning of a stamped page
(see `dmaproof.stamp`) with LBA 0 and the number of the packet as request number. So the guest can
check that each packet is complete and newer than the one before. The device drops other frames.

A network device does its DMA on the receive path: the driver puts buffers into the ring long before
packets arrive.
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

HEADER: Final = struct.Struct("<BBHHHHH")
"""struct virtio_net_hdr with num_buffers, which it has under VIRTIO_F_VERSION_1."""
PLAIN_HEADER: Final = HEADER.pack(0, 0, 0, 0, 0, 0, 1)
"""The header of a frame in one buffer, without checksums or segments."""
ETHERTYPE: Final = 0x88B5
"""The IEEE 802 EtherType for local experiments."""
_ETHERNET: Final = struct.Struct("!6s6sH")
_BROADCAST, _SENDER = b"\xff" * 6, b"\x02dmapr"
PAYLOAD_BYTES: Final = 1496
"""As many whole words of a stamp as fit into a frame of the usual size."""
RECEIVE: Final = 0
"""The queue of packets for the guest; the other queue has the packets that the guest sends."""
_MOST_AT_A_TIME: Final = 1 << 10


def network_card(chardev: str, properties: Sequence[str]) -> list[str]:
    """Return QEMU's arguments for one pair of queues, on PCI always without interrupt vectors.

    With vectors, QEMU 7.2 under TCG dies of SIGSEGV when the guest's driver unmasks one: it calls
    kvm_virtio_pci_irqfd_use without KVM.
    """
    device = (f"virtio-net-pci,netdev=net-{chardev}", "vectors=0", "romfile=")
    return [
        *("-netdev", f"vhost-user,id=net-{chardev},chardev={chardev}"),
        *("-device", ",".join((*device, *properties))),
    ]


class Net(VirtioDevice):
    """A network device with one pair of virtqueues; QEMU serves its configuration space."""

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
        return network_card(chardev, properties)

    def is_ready(self, queue: int) -> bool:
        """Return False for the receive queue while no packets are asked for."""
        return queue != RECEIVE or self._asked_for > 0

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        self.begin_request(dma)
        if dma.journal.queue == RECEIVE:
            return self._receive(chain, dma)
        frame = gather(take(chain.readable, HEADER.size, _ETHERNET.size + 4), dma)
        if len(frame) == _ETHERNET.size + 4 and _ETHERNET.unpack_from(frame)[2] == ETHERTYPE:
            (count,) = struct.unpack_from("<I", frame, _ETHERNET.size)
            self._asked_for = min(self._asked_for + count, _MOST_AT_A_TIME)
        return 0

    def _receive(self, chain: DescriptorChain, dma: Dma) -> int:
        self._asked_for -= 1
        packet = (
            PLAIN_HEADER
            + _ETHERNET.pack(_BROADCAST, _SENDER, ETHERTYPE)
            + stamped_page(0, self.requests)[:PAYLOAD_BYTES]
        )
        if sum(length for _, length in chain.writable) < len(packet):
            raise ProtocolError(
                f"receive buffer of packet {self.requests} is shorter than {len(packet)} bytes"
            )
        return scatter(packet, chain.writable, dma)
