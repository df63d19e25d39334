"""The findings in QEMU that one QEMU shows without a guest.

A vhost-user device of QEMU needs a back end that offers features. dmaproof's block device is one
for each of them, because no driver uses the device.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..devices.emulated import EmulatedDevice
from ..devices.process import DeviceOptions
from ..host.run_folder import run_folder
from ..qemu.machine import DESTINATION
from ..qemu.qemu import OwnedQemu, running_qemu
from ..qemu.qmp import QmpClosedError, QmpRefusal
from .finding import State, UnderTest
from .qemu_finding import QemuFinding

_ID: Final = "d"
_PATH: Final = f"/machine/peripheral/{_ID}/virtio-backend"
_RNG: Final = ("-machine", "q35", "-S", "-device", f"virtio-rng-pci,id={_ID}")
_RNG_RING: Final = 8
"""The entries of virtio-rng's ring."""
_SHARED_RAM: Final = (
    *("-machine", "pc,memory-backend=ram", "-m", "64M", "-S", "-accel", "tcg"),
    *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
)
_SLOT: Final = 5
_PORTS: Final = 0xC000
"""Where the test puts the I/O ports of the device."""
_SCSI_F_CHANGE: Final = 1 << 2
"""VIRTIO_SCSI_F_CHANGE (virtio 1.2, section 5.6.3)."""


class RingSize(QemuFinding):
    """QEMU gives a ring more entries than its device wants."""

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Ask for the size of a ring."""
        async with _qemu(qemu, ("-accel", "tcg", *_RNG), under_test) as running:
            answer = await running.qmp.execute("x-query-virtio-queue-status", path=_PATH, queue=0)
        entries = answer["vring-num-default"]
        found = f"the ring of virtio-rng has {entries} entries; the device wants {_RNG_RING}"
        return (State.NOT_REPRODUCED if entries == _RNG_RING else State.REPRODUCED), found


class StatusAborts(QemuFinding):
    """A question about a virtio device ends QEMU."""

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Ask for the status of a device."""
        async with _qemu(qemu, ("-accel", "tcg", *_RNG), under_test) as running:
            try:
                await running.qmp.execute("x-query-virtio-status", path=_PATH)
            except QmpClosedError as error:
                return State.REPRODUCED, f"{error}\n{running.process.log_tail()}".rstrip()
        return State.NOT_REPRODUCED, "QEMU answers x-query-virtio-status"


@dataclass(frozen=True)
class MigratesWithoutState(QemuFinding):
    """QEMU migrates a vhost-user `device` of which it sends no state."""

    device: str

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Ask QEMU to migrate, which it must refuse."""
        async with _with_back_end(qemu, self.device, under_test) as running:
            try:
                await running.qmp.execute("migrate", uri="exec:cat >/dev/null")
            except QmpRefusal as error:
                return State.NOT_REPRODUCED, str(error)
        return State.REPRODUCED, f"QEMU migrates a guest that has {self.device}"


@dataclass(frozen=True)
class OffersFeature(QemuFinding):
    """QEMU offers the guest VIRTIO_SCSI_F_CHANGE, which the back end of `device` does not offer."""

    device: str

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Read the features that a driver would read."""
        device = f"{self.device},disable-modern=on,addr={_SLOT:#x}"
        async with _with_back_end(qemu, device, under_test) as running:
            features = await _legacy_features(running)
        offered = bool(features & _SCSI_F_CHANGE)
        whether = "offers" if offered else "does not offer"
        found = (
            f"the back end does not offer VIRTIO_SCSI_F_CHANGE, and QEMU {whether} it to the guest "
            f"(features {features:#x})"
        )
        return (State.REPRODUCED if offered else State.NOT_REPRODUCED), found


@asynccontextmanager
async def _qemu(
    qemu: Path, arguments: Sequence[str], under_test: UnderTest
) -> AsyncIterator[OwnedQemu]:
    with run_folder(keep=under_test.keep) as folder:
        async with running_qemu(
            "tested", qemu, arguments, folder, timeout_s=under_test.timeout_s
        ) as running:
            yield running


@asynccontextmanager
async def _with_back_end(
    qemu: Path, device: str, under_test: UnderTest
) -> AsyncIterator[OwnedQemu]:
    """Run a QEMU with `device`, whose back end does not offer VIRTIO_SCSI_F_CHANGE."""
    options = DeviceOptions(destination_lacks=_SCSI_F_CHANGE)
    back_end = EmulatedDevice(options)
    with run_folder(keep=under_test.keep) as folder:
        async with back_end.start(folder, under_test.timeout_s) as attached:
            *chardev, _, _ = await attached.attach(DESTINATION)
            arguments = [
                *_SHARED_RAM,
                *chardev,
                *("-device", f"{device},chardev={back_end.name}"),
            ]
            async with running_qemu(
                "tested", qemu, arguments, folder, timeout_s=under_test.timeout_s
            ) as running:
                yield running


async def _legacy_features(running: OwnedQemu) -> int:
    """Read the features of the device in `_SLOT` as a legacy driver does (virtio 1.2, 4.1.4.10)."""
    place = 1 << 31 | _SLOT << 11
    for register, value in ((0x10, _PORTS), (0x04, 1)):
        await running.monitor(f"o/w 0xcf8 {place | register:#x}")
        await running.monitor(f"o/w 0xcfc {value:#x}")
    answer = await running.monitor(f"i/w {_PORTS:#x}")
    printed = re.search(r"= (0x[0-9a-f]+)", answer)
    if printed is None:
        raise UntestableError(f"expected the value of a port from {running.name}, got {answer!r}")
    return int(printed[1], 16)
