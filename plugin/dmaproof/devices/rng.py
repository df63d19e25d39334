"""A virtio entropy device (virtio 1.2, section 5.4): random bytes into whatever buffer comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Final

from ..dma import Dma
from ..virtqueue import DescriptorChain
from .segments import scatter

_MAX_REQUEST_BYTES: Final = 1 << 20
"""A device may fill less than it is given (section 5.4.6.1)."""


class Rng:
    """A source of entropy with one virtqueue."""

    name: ClassVar[str] = "rng"
    guests: ClassVar[Collection[str]] = ("linux", "bare")
    options: ClassVar[Mapping[str, Callable[[str], Any]]] = {}
    linux: ClassVar[tuple[Sequence[str], str]] = (("virtio_pci",), "")
    restartable: ClassVar[bool] = False
    has_workload: ClassVar[bool] = False
    features = 0
    queues = 1

    def __init__(self) -> None:
        self.requests = 0

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        """See `VirtioDevice.qemu_arguments`."""
        return ["-device", ",".join((f"vhost-user-rng-pci,chardev={chardev}", *properties))]

    def config(self) -> bytes:
        """See `VirtioDevice.config`; it has none."""
        return b""

    def is_ready(self, queue: int) -> bool:
        """See `VirtioDevice.is_ready`."""
        return True

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """See `VirtioDevice.process`."""
        self.requests += 1
        dma.journal.request = self.requests
        room = sum(length for _, length in chain.writable)
        return scatter(os.urandom(min(room, _MAX_REQUEST_BYTES)), chain.writable, dma)
