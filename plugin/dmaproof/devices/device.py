"""The base class of virtio devices: what differs between device types, and the usual defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from ..dma import Dma
from ..virtqueue import DescriptorChain


class VirtioDevice(ABC):
    """The base class of every device that the back end serves.

    A subclass defines `name`, `qemu_arguments` and `process`, and overrides the defaults that do
    not fit. One object serves all sessions of its process, so its counters continue from the source
    to the destination of a migration.

    The device of the example shows the interface, but a proof with it ends without a verdict: QEMU
    refuses to migrate vhost-user-rng. ``docs/write-a-device.md`` has a disk that can be proved.

    Example:
        >>> from dmaproof import scatter
        >>> class Zeros(VirtioDevice):
        ...     name = "zeros"
        ...
        ...     @staticmethod
        ...     def qemu_arguments(chardev, queues, properties):
        ...         device = (f"vhost-user-rng-pci,chardev={chardev}", *properties)
        ...         return ["-device", ",".join(device)]
        ...
        ...     def process(self, chain, dma):
        ...         self.begin_request(dma)
        ...         return scatter(bytes(16), chain.writable, dma)
    """

    name: ClassVar[str]
    """The device's name for users: the value of option ``--device``, up to a colon."""
    guests: ClassVar[Collection[str]] = ("linux",)
    """The guests of dmaproof that have a driver for the device."""
    linux: ClassVar[tuple[Sequence[str], str]] = (("virtio_pci",), "")
    """The Linux modules of the driver, and the argument by which ``guests/linux`` finds the
    device."""
    options: ClassVar[Mapping[str, Callable[[str], Any]]] = {}
    """Option name → function that converts the option's text to the class's argument."""
    restartable: ClassVar[bool] = False
    """Whether QEMU keeps the requests in flight, so that the device process can be replaced."""
    has_workload: ClassVar[bool] = False
    """Whether the guests' workload runs on the device; otherwise a proof adds one that has it."""
    is_network: ClassVar[bool] = False
    """Whether the workload runs over a network, whose frames the guest's kernel copies."""
    features: int = 0
    """Feature bits of the device type; the back end adds transport and vhost bits."""
    queues: int = 1
    """The largest number of virtqueues that the device can have."""
    requests: int = 0
    """The number of the last request; it increases by one with each request."""

    @staticmethod
    @abstractmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        """Return the QEMU arguments that add the device.

        Args:
            chardev: the id of the QEMU chardev over which the device is served.
            queues: the number of virtqueues that the user asked for (option ``--queues``).
            properties: properties of virtio on PCI, such as 'packed=on'.

        Returns:
            Words for QEMU's command line.
        """

    def config(self) -> bytes:
        """Return the device's configuration space; empty if the device has none."""
        return b""

    def is_ready(self, queue: int) -> bool:
        """Return whether the device can serve a request of a queue now.

        The answer may change only when the device serves a request of another queue.

        Args:
            queue: the index of the queue.

        Returns:
            True by default.
        """
        return True

    def begin_request(self, dma: Dma) -> int:
        """Count a request, and attribute the writes that follow to it.

        Args:
            dma: the `Dma` that `process` was given.

        Returns:
            The request's number.
        """
        self.requests += 1
        dma.journal.request = self.requests
        return self.requests

    @abstractmethod
    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """Serve one request of the queue ``dma.journal.queue``.

        Args:
            chain: the request's buffers.
            dma: the device's only access to guest RAM.

        Returns:
            The number of bytes written into the request's buffers.

        Raises:
            ProtocolError: the request breaks the device's specification, and no error status fits.
            MemoryAccessError: a buffer lies outside guest RAM.
        """
