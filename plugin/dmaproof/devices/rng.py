"""A virtio entropy device (virtio 1.2, section 5.4), which fills each buffer with random bytes."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import ClassVar, Final

from ..dma import Dma
from ..virtqueue import DescriptorChain
from .device import VirtioDevice
from .segments import scatter

_MAX_REQUEST_BYTES: Final = 1 << 20
"""A device may fill less than the whole buffer (section 5.4.6.1)."""


class Rng(VirtioDevice):
    """A source of entropy with one virtqueue."""

    name: ClassVar[str] = "rng"
    guests: ClassVar[Collection[str]] = ("linux", "bare")

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        return ["-device", ",".join((f"vhost-user-rng-pci,chardev={chardev}", *properties))]

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        self.begin_request(dma)
        writable = sum(length for _, length in chain.writable)
        return scatter(os.urandom(min(writable, _MAX_REQUEST_BYTES)), chain.writable, dma)
