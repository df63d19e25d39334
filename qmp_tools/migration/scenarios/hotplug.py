"""Migrations of a guest into which something was plugged while it ran."""

from __future__ import annotations

from dmaproof.errors import UsageError

from ...devices.device import ProofDevice
from ..pair import QemuPair
from .base import Scenario


class MemoryHotplug(Scenario):
    """A DIMM plugged before each of two migrations; the guest's write-once pages lie in it."""

    name = "memory-hotplug"
    summary = "a DIMM plugged and used, there; another plugged and used, and back"
    migrations = 2
    dimms = migrations

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the source, plug a DIMM, and start a destination that has it too."""
        await pair.guarded(pair.start_source())
        await pair.guarded(pair.boot())
        await self.start_return(pair)

    async def start_return(self, pair: QemuPair) -> None:
        """Plug another DIMM, and start a new destination."""
        await pair.guarded(pair.plug_dimm())
        await super().start_return(pair)


class DeviceHotplug(Scenario):
    """The disk plugged into the running guest."""

    name = "device-hotplug"
    summary = "the disk plugged into the running guest"
    # A q35 takes devices only behind a port, and gives them no address there.
    machine = "pc"

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the source, plug the disk, and start a destination that has it from the start."""
        await pair.guarded(pair.start_source_without_devices())
        await pair.guarded(pair.boot_and_plug_devices())
        await pair.guarded(pair.start_destination())

    def require_device(self, device: ProofDevice) -> None:
        """Refuse what is not a disk.

        Raises:
            UsageError: the device is not one.
        """
        if not device.driver.has_disk:
            raise UsageError(
                f"--scenario {self.name}: it plugs a disk, and {device.facts.device} is not one"
            )
