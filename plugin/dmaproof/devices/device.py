"""What a virtio device is: the part that differs from type to type, with the defaults of most."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from ..dma import Dma
from ..virtqueue import DescriptorChain


class VirtioDevice(ABC):
    """The base class of every device that the back end serves.

    A subclass has a `name`, `qemu_arguments` and `process`, and whatever else differs from the
    defaults. One object serves every session of its process, so what it counts goes on from the
    source to the destination of a migration.

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
    """What users call it by: the value of option ``--device``, up to a colon."""
    guests: ClassVar[Collection[str]] = ("linux",)
    """The guests of dmaproof that have a driver for it."""
    linux: ClassVar[tuple[Sequence[str], str]] = (("virtio_pci",), "")
    """The Linux modules of its driver, and what ``guests/linux`` is told of where it is."""
    options: ClassVar[Mapping[str, Callable[[str], Any]]] = {}
    """Options by name: how the class's argument of that name is made from text."""
    restartable: ClassVar[bool] = False
    """Whether QEMU keeps for it what is in flight, so that its process can be replaced."""
    has_workload: ClassVar[bool] = False
    """Whether the guests' workload runs on it; what it does not run on needs one beside it."""
    features: int = 0
    """Feature bits of the device type; transport and vhost bits are the back end's."""
    queues: int = 1
    """The number of virtqueues that the device has at most."""
    requests: int = 0
    """The number of the last request: it rises with each that is served."""

    @staticmethod
    @abstractmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        """Return the arguments that give a QEMU the device.

        Args:
            chardev: the id of QEMU's chardev behind which the device is served.
            queues: the number of virtqueues.
            properties: the wanted properties of virtio on PCI, such as 'packed=on'.

        Returns:
            Words of QEMU's command line.
        """

    def config(self) -> bytes:
        """Return the device's configuration space; empty if it has none."""
        return b""

    def is_ready(self, queue: int) -> bool:
        """Tell whether a request of a queue can be served now.

        Only a request of another queue can change that.

        Args:
            queue: the index of the queue.

        Returns:
            True for the devices that serve whatever comes.
        """
        return True

    def begin_request(self, dma: Dma) -> int:
        """Count a request, and book the writes that follow to it.

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
        """Carry out one request, which came by the queue ``dma.journal.queue``.

        Args:
            chain: the request's buffers.
            dma: reads and writes guest RAM; a device touches guest RAM by nothing else.

        Returns:
            The number of bytes written into the request's buffers.

        Raises:
            ProtocolError: the request breaks the device's specification beyond an error status.
            MemoryAccessError: a buffer lies outside guest RAM.
        """
