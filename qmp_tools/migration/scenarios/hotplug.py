"""Migrations of a guest into which dmaproof has plugged memory or a device while it ran."""

from __future__ import annotations

from ...devices.device import ProofDevice
from ...qemu.machine import Hardware
from ..pair import QemuPair
from .base import Scenario, require_disk


class MemoryHotplug(Scenario):
    """A DIMM is plugged before each of two migrations; it holds the guest's write-once pages."""

    name = "memory-hotplug"
    summary = "The guest migrates there and back; before each migration a DIMM is plugged and used"
    migrations = 2
    added = Hardware(dimms=migrations)

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the source, plug a DIMM, and start a destination with the same DIMM."""
        await pair.guarded(pair.start_source())
        await pair.guarded(pair.boot())
        await self.start_return(pair)

    async def start_return(self, pair: QemuPair) -> None:
        """Plug another DIMM, and start a new destination."""
        await pair.guarded(pair.plug_dimm())
        await super().start_return(pair)


class DeviceHotplug(Scenario):
    """The disk is plugged into the running guest."""

    name = "device-hotplug"
    summary = "The disk is plugged into the running guest, which then migrates"
    plugs_devices = True

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the source, plug the disk, and start a destination that already has the disk."""
        await pair.guarded(pair.start_source_without_devices())
        await pair.guarded(pair.boot_and_plug_devices())
        await pair.guarded(pair.start_destination())

    def require_device(self, device: ProofDevice) -> None:
        """Refuse a device that is not a disk."""
        require_disk(self, device)
