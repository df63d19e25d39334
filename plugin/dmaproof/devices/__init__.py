"""Emulated virtio devices: each a class with the virtio part only, in a file of its own.

A device file defines one class with a `name`; `emulated_devices` finds it by walking this package,
so a new device is one new file. What QEMU has to be told of it stands there too. A device is asked
for as ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from ..discovery import named_classes
from ..dma import Dma
from ..errors import UsageError
from ..virtqueue import DescriptorChain


class VirtioDevice(Protocol):
    """What the vhost-user back end needs of a device.

    One object serves every session of its process, so what it counts goes on from the source to
    the destination of a migration.
    """

    name: ClassVar[str]
    guests: ClassVar[Collection[str]]
    """The guests of ours that have a driver for it."""
    linux: ClassVar[tuple[Sequence[str], str]]
    """By which modules Linux comes to it, and what ``guests/linux`` is told of where it is."""
    options: ClassVar[Mapping[str, Callable[[str], Any]]]
    """What it can be told, by name: how the class's argument of that name is made from text."""
    restartable: ClassVar[bool]
    """Whether QEMU keeps for it what is in flight, so that its process can be replaced."""
    has_workload: ClassVar[bool]
    """Whether the guests' workload runs on it; what it does not run on needs one beside it."""
    features: int
    """Feature bits of the device type; transport and vhost bits are the back end's."""
    queues: int
    """How many virtqueues the device has at the most."""
    requests: int
    """The number of the last request: they rise with each that is served."""

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        """What makes a QEMU have the device, served behind its `chardev` and with so many queues.

        `properties` are those of virtio on PCI that are wanted, such as 'packed=on'.
        """

    def config(self) -> bytes:
        """The device's configuration space."""

    def is_ready(self, queue: int) -> bool:
        """Whether a request of this queue can be served now.

        Only a request of another queue can change that.
        """

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """Carry out one request; returns the bytes written into its buffers.

        It came by the queue `dma.journal.queue`.

        Raises:
            ProtocolError: the request breaks the device's specification beyond an error status.
            MemoryAccessError: a buffer lies outside guest RAM.
        """


def emulated_devices() -> dict[str, type[VirtioDevice]]:
    """The devices of this package by name; call one to make a device of its default form."""
    return dict(named_classes(sys.modules[__name__]))


def parse_device(text: str) -> tuple[type[VirtioDevice], dict[str, Any]]:
    """The class, and its arguments, of the device that ``NAME[:OPTION=VALUE,…]`` asks for.

    A comma in a value is doubled.

    Raises:
        UsageError: there is no such device or option, or it cannot have that value.
    """
    name, _, options = text.partition(":")
    known = emulated_devices()
    if name not in known:
        raise UsageError(f"device {name!r} is not known; there are: {', '.join(sorted(known))}")
    arguments = {}
    for pair in _pairs(options):
        option, _, value = pair.partition("=")
        convert = known[name].options.get(option)
        if convert is None:
            there_are = ", ".join(known[name].options) or "none"
            raise UsageError(f"device {name} has no option {option!r}; there are: {there_are}")
        try:
            arguments[option] = convert(value)
        except ValueError:
            raise UsageError(f"device {name}: {pair} is not understood") from None
    return known[name], arguments


def _pairs(options: str) -> list[str]:
    """The parts between single commas: a doubled one belongs to a value, as with QEMU's options."""
    pairs = options.replace(",,", "\0").split(",")
    return [pair.replace("\0", ",") for pair in pairs if pair]


def make_device(text: str) -> VirtioDevice:
    """The device that ``NAME[:OPTION=VALUE,…]`` asks for.

    Raises:
        UsageError: there is none, or it cannot be made so.
    """
    make, arguments = parse_device(text)
    return make(**arguments)
