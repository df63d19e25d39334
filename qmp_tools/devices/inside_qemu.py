"""A device that QEMU itself emulates, as ``--device qemu:NAME`` names it.

Its writes go through QEMU's own address space functions, which dirty the pages. It keeps no
journal, and its disk is an image file (see disk_image.py). Here are those that a guest of ours can
drive.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from dmaproof.errors import UntestableError, UsageError
from dmaproof.evidence import Evidence

from ..guest import linux
from ..processes.process import Process
from .device import AttachedDevice, DeviceFacts, never
from .disk_image import file_node, write_image


@dataclass(frozen=True)
class _Kind:
    """`devices` are the values of QEMU's ``-device``; the first is the one that does the DMA."""

    devices: Sequence[str]
    driver: linux.Driver
    guests: Collection[str] = ("linux",)


def _scsi(adapter: str, driver: linux.Driver) -> _Kind:
    return _Kind((f"{adapter},id=adapter", "scsi-hd,drive=disk,bus=adapter.0"), driver)


KINDS: Final = {
    "virtio-blk-pci": _Kind(
        ("virtio-blk-pci,drive=disk,num-queues={queues}",), linux.VIRTIO_BLK, ("bare", "linux")
    ),
    "virtio-scsi-pci": _scsi("virtio-scsi-pci,num_queues={queues}", linux.VIRTIO_SCSI),
    "nvme": _Kind(("nvme,drive=disk,serial=dmaproof,max_ioqpairs={queues}",), linux.NVME),
    "ahci": _Kind(("ahci,id=adapter", "ide-hd,drive=disk,bus=adapter.0"), linux.AHCI),
    "lsi53c895a": _scsi("lsi53c895a", linux.LSI),
    "megasas": _scsi("megasas", linux.MEGASAS),
    "pvscsi": _scsi("pvscsi", linux.PVSCSI),
}
"""By QEMU's own names."""


@dataclass(frozen=True)
class InsideQemu:
    """See `ProofDevice`. `name` is one of `KINDS`; `queues` go to those that have a choice.

    Raises:
        UsageError: no guest of ours drives such a device.
    """

    name: str
    queues: int = 2

    image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UsageError(
                f"--device qemu:{self.name}: no guest drives it; those that one does are "
                f"{', '.join(KINDS)}"
            )

    @property
    def facts(self) -> DeviceFacts:
        """See `ProofDevice.facts`."""
        return DeviceFacts(f"qemu:{self.name}", self.queues)

    @property
    def guests(self) -> Collection[str]:
        """See `ProofDevice.guests`."""
        return KINDS[self.name].guests

    @property
    def driver(self) -> linux.Driver:
        """See `ProofDevice.driver`."""
        return KINDS[self.name].driver

    def with_fault(self, fault: str) -> InsideQemu:
        """See `ProofDevice.with_fault`."""
        raise UsageError(f"{fault} cannot be planted in a device of QEMU's")

    @asynccontextmanager
    async def start(self, folder: Path) -> AsyncIterator[AttachedDevice]:
        """See `ProofDevice.start`."""
        image = folder / "disk"
        write_image(image)
        yield _Attached(self, image)


class _Attached:
    def __init__(self, setup: InsideQemu, image: Path) -> None:
        self.processes: Sequence[Process] = ()
        self._setup = setup
        self._image = image

    async def attach(self, side: str) -> Sequence[str]:
        devices = [
            device.format(queues=self._setup.queues) for device in KINDS[self._setup.name].devices
        ]
        return [
            *("-blockdev", file_node(self._image)),
            *(word for device in devices for word in ("-device", device)),
        ]

    def release(self, side: str) -> None:
        pass  # it is QEMU

    async def refusal(self) -> UntestableError:
        return await never()  # QEMU's own devices do not tell

    async def logging_ended(self, side: str) -> None:
        pass  # QEMU keeps its log itself

    def accepted_features(self, side: str) -> int | None:
        return None

    async def evidence(self, side: str) -> Evidence | None:
        return None
