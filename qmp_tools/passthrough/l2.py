"""L2: a QEMU with vfio-pci on fake devices, as it is started inside L1.

L2 has no guest system, so no vCPU writes RAM, only the devices do. The engine of each device writes
a window of RAM round after round until the device is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dmaproof.units import PAGE_BYTES

from ..qemu.qemu import OwnedQemu, running_qemu
from . import plugged_memory
from .fake_device import Engine, FakeDevice
from .fake_driver import any_driver, open_iommufd
from .l1.machine import TESTED_QEMU
from .outcome import NotSupportedError
from .tracking import Tracking

QEMU: Final = Path(os.environ.get(TESTED_QEMU, "/usr/bin/qemu-system-x86_64"))
RAM_BYTES: Final = 32 << 20
RAM_PAGES: Final = RAM_BYTES // PAGE_BYTES
FIRST_WINDOW: Final = 8 << 20  # above what the firmware uses
WINDOWS_BYTES: Final = 8 << 20
"""The windows of all devices together."""
FIRST_SLOT: Final = 5
"""The PCI slot of device 0; the other devices are in the slots after it."""

_MULTIFD: Final = "x-migration-multifd-transfer"
"""The property with which QEMU refuses a migration that does not use multifd for the state."""


@dataclass(frozen=True)
class Plan:
    """What to migrate: an L2 with a device for each of `trackings`.

    `faults` are parameters of the module, which the source's device number `victim` has. The device
    number `removed` is unplugged before the migration. If `in_plugged_memory`, the devices write
    memory of virtio-mem. With `multifd`, QEMU migrates also the devices' states over its channels.
    """

    trackings: tuple[Tracking, ...]
    faults: Mapping[str, int] = field(default_factory=dict)
    victim: int = 0
    removed: int | None = None
    in_plugged_memory: bool = False
    multifd: bool = False

    @property
    def migrated(self) -> tuple[int, ...]:
        """The numbers of the devices that are migrated."""
        return tuple(n for n in range(len(self.trackings)) if n != self.removed)

    def engine(self, number: int) -> Engine:
        """Return what the device writes."""
        length = WINDOWS_BYTES // len(self.trackings)
        first = plugged_memory.PLUGGED_FIRST if self.in_plugged_memory else FIRST_WINDOW
        return Engine(iova=first + number * length, length=length)


@dataclass(frozen=True)
class TestedQemu:
    """The QEMU that L2 runs on: its version, and the properties of its vfio-pci."""

    version: str
    vfio_pci: frozenset[str]


@functools.cache
def tested_qemu(timeout_s: float) -> TestedQemu:
    """Query the QEMU under test.

    Raises:
        QmpError: QEMU does not run, or has no vfio-pci.
    """
    return asyncio.run(_ask_qemu(timeout_s))


async def _ask_qemu(timeout_s: float) -> TestedQemu:
    async with run_l2("tested", ["-machine", "none"], timeout_s) as qemu:
        properties = await qemu.qmp.execute("device-list-properties", typename="vfio-pci")
    number = qemu.version.split()[0]  # without the packager's suffix
    return TestedQemu(number, frozenset(entry["name"] for entry in properties))


@contextlib.asynccontextmanager
async def run_l2(name: str, arguments: Sequence[str], timeout_s: float) -> AsyncIterator[OwnedQemu]:
    """Run the QEMU under test with these arguments."""
    with tempfile.TemporaryDirectory(prefix="l2-") as folder:
        async with running_qemu(name, QEMU, arguments, Path(folder), timeout_s=timeout_s) as qemu:
            yield qemu


@functools.cache
def _require_device_log() -> None:
    """Fail with the kernel's error if it cannot log a device's DMA.

    Without this check QEMU's migration would fail half-way.
    """
    with any_driver() as driver:
        driver.device.start_logging([driver.window], PAGE_BYTES)
        driver.device.report(*driver.window, PAGE_BYTES)


def require_kernel_support(trackings: Sequence[Tracking]) -> None:
    """Fail with the kernel's error if it does not have what QEMU needs for these trackings."""
    if any(tracking.iommufd for tracking in trackings):
        open_iommufd().close()
    if any(tracking.device for tracking in trackings):
        _require_device_log()


def machine_arguments(
    plan: Plan, devices: Mapping[int, FakeDevice], qemu: TestedQemu, *front: str, **options: str
) -> list[str]:
    """Return QEMU's arguments for L2 with these devices of the plan.

    `front` comes before the devices. Each device has these `options`.

    Raises:
        NotSupportedError: this QEMU's vfio-pci has no property that the plan needs.
    """
    if plan.multifd:
        if _MULTIFD not in qemu.vfio_pci:
            raise NotSupportedError(f"this QEMU's vfio-pci has no property {_MULTIFD}")
        options[_MULTIFD] = "on"
    # On a q35 only devices behind a bridge can be unplugged.
    machine = "q35" if plan.removed is None else "pc"
    most = f",maxmem={RAM_BYTES + plugged_memory.BYTES}" if plan.in_plugged_memory else ""
    objects = dict.fromkeys(plan.trackings[n].objects for n in devices)
    arguments = [
        # Some QEMUs are built without qtest; with TCG, the firmware runs in L2.
        *("-machine", f"{machine},memory-backend=ram", "-accel", "qtest", "-accel", "tcg"),
        *("-m", f"size={RAM_BYTES >> 20}M{most}"),
        *("-object", f"memory-backend-memfd,id=ram,size={RAM_BYTES},share=on"),
        *(plugged_memory.arguments() if plan.in_plugged_memory else ()),
        *(word for words in objects for word in words),
        *front,
    ]
    for number, device in devices.items():
        slot = {"id": device_id(number), "addr": f"{FIRST_SLOT + number}"}
        tracking = plan.trackings[number]
        option = tracking.device_option(device.sysfs, qemu.vfio_pci, **slot, **options)
        arguments += ["-device", option]
    return arguments


def device_id(number: int) -> str:
    """Return QEMU's id of a device."""
    return f"device{number}"
