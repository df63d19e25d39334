"""Use a device that QEMU itself emulates (``--device qemu:NAME``).

The device writes with QEMU's address space functions, which mark the pages dirty. It keeps no
journal. A disk is an image file (see disk_image.py). A network is a socket that is its own peer, so
every frame of the guest comes back. This module lists the devices that dmaproof's guests can drive.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ..guest import drivers
from ..guest.workload import Workload
from ..qemu.machine import option_value
from .device import AttachedDevice, DeviceFacts, ProofDevice, on_image, on_network
from .disk_image import file_node, write_image


@dataclass(frozen=True)
class _Kind:
    """A device of QEMU: `devices` are the values of ``-device``; the first device does the DMA."""

    devices: Sequence[str]
    driver: drivers.Driver
    guests: Collection[str] = ("linux",)
    network: bool = False


def _scsi(adapter: str, driver: drivers.Driver) -> _Kind:
    return _Kind((f"{adapter},id=adapter", "scsi-hd,drive=disk,bus=adapter.0"), driver)


def _network(name: str, driver: drivers.Driver) -> _Kind:
    return _Kind((f"{name},netdev=net",), driver, network=True)


KINDS: Final = {
    "virtio-blk-pci": _Kind(
        ("virtio-blk-pci,drive=disk,num-queues={queues}",), drivers.VIRTIO_BLK, ("bare", "linux")
    ),
    "virtio-scsi-pci": replace(
        _scsi("virtio-scsi-pci,num_queues={queues}", drivers.VIRTIO_SCSI), guests=("bare", "linux")
    ),
    "nvme": _Kind(("nvme,drive=disk,serial=dmaproof,max_ioqpairs={queues}",), drivers.NVME),
    "ahci": _Kind(("ahci,id=adapter", "ide-hd,drive=disk,bus=adapter.0"), drivers.AHCI),
    "lsi53c895a": _scsi("lsi53c895a", drivers.LSI),
    "megasas": _scsi("megasas", drivers.MEGASAS),
    "pvscsi": _scsi("pvscsi", drivers.PVSCSI),
    "virtio-net-pci": replace(
        _network("virtio-net-pci", drivers.VIRTIO_NET), guests=("bare", "linux")
    ),
    "e1000": _network("e1000", drivers.E1000),
    "e1000e": _network("e1000e", drivers.E1000E),
    "igb": _network("igb", drivers.IGB),
    "vmxnet3": _network("vmxnet3", drivers.VMXNET3),
}
"""The devices by QEMU's names."""

_DISK: Final = "disk"


@dataclass(frozen=True)
class InsideQemu(ProofDevice):
    """A device inside QEMU: `name` is one of `KINDS`; `queues` counts only for some of them.

    Raises:
        UsageError: none of dmaproof's guests drives this device.
    """

    name: str
    queues: int = 2

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UsageError(
                f"--device qemu:{self.name}: none of dmaproof's guests drives this device; choose "
                f"one of {', '.join(KINDS)}"
            )

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(f"qemu:{self.name}", self.queues)

    @property
    def guests(self) -> Collection[str]:
        return KINDS[self.name].guests

    @property
    def driver(self) -> drivers.Driver:
        return KINDS[self.name].driver

    @property
    def direct(self) -> bool:
        return not KINDS[self.name].network

    def adapt(self, workload: Workload) -> Workload:
        return on_network(workload) if KINDS[self.name].network else on_image(workload)

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        if not KINDS[self.name].network:
            write_image(folder / _DISK)
        yield _Attached(self, folder)


def own_peer(socket: Path) -> str:
    """Return QEMU's ``-netdev`` value for a network 'net' over a socket that is its own peer."""
    path = option_value(socket)
    ends = (f"{end}.type=unix,{end}.path={path}" for end in ("local", "remote"))
    return f"dgram,id=net,{','.join(ends)}"


class _Attached(AttachedDevice):
    def __init__(self, setup: InsideQemu, folder: Path) -> None:
        self._setup = setup
        self._folder = folder

    async def attach(self, side: str) -> Sequence[str]:
        kind = KINDS[self._setup.name]
        devices = [device.format(queues=self._setup.queues) for device in kind.devices]
        backend = ["-blockdev", file_node(self._folder / _DISK)]
        if kind.network:
            socket = self._folder / f"{side}-net.sock"
            socket.unlink(missing_ok=True)
            backend = ["-netdev", own_peer(socket)]
        return [*backend, *(word for device in devices for word in ("-device", device))]
