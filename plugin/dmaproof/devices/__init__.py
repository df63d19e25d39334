"""Emulated virtio devices: each a class with the virtio part only, in a file of its own.

A device file defines one class with a `name`; `emulated_devices` finds it by walking this package,
so a new device is one new file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ClassVar, Protocol

from ..discovery import named_classes
from ..dma import Dma
from ..virtqueue import DescriptorChain


class VirtioDevice(Protocol):
    """What the vhost-user back end needs of a device.

    One object serves every session of its process, so what it counts goes on from the source to
    the destination of a migration.
    """

    name: ClassVar[str]
    features: int
    """Feature bits of the device type; transport and vhost bits are the back end's."""
    queues: int
    """How many virtqueues the device has at the most."""

    def config(self) -> bytes:
        """The device's configuration space."""

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """Carry out one request; returns the bytes written into its buffers.

        Raises:
            ProtocolError: the request breaks the device's specification beyond an error status.
            MemoryAccessError: a buffer lies outside guest RAM.
        """


def emulated_devices() -> dict[str, Callable[[], VirtioDevice]]:
    """The devices of this package by name; call one to make a device of its default form."""
    return dict(named_classes(sys.modules[__name__]))
