"""Use one of dmaproof's devices, with a tracker and a journal, in a process for both QEMUs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.devices import VirtioDevice, parse_device
from dmaproof.errors import UntestableError, UsageError
from dmaproof.evidence import Evidence
from dmaproof.vhost_user.features import F_ACCESS_PLATFORM, F_RING_PACKED

from ..guest.drivers import Driver
from ..guest.workload import Workload
from ..host.process import Process
from ..qemu.machine import DESTINATION, SOURCE, option_value
from ..qemu.pci_express import behind_iommu, device_port
from .device import AttachedDevice, DeviceFacts, ProofDevice, on_network
from .process import Device, DeviceOptions

RINGS: Final = ("split", "packed")
"""The forms of a virtqueue (virtio 1.2, sections 2.7 and 2.8)."""


@dataclass(frozen=True)
class EmulatedDevice(ProofDevice):
    """One of dmaproof's devices, with `queues` virtqueues of the form `ring` (one of `RINGS`).

    If `killed`, the device is killed during the migration and started again; if
    `destination_killed`, the destination's device is, after the migration. Each of several devices
    has its own `name`. A device behind QEMU's IOMMU is plugged into the root port with the
    number `iommu_port`.
    """

    options: DeviceOptions
    queues: int = 2
    ring: str = "split"
    killed: bool = False
    name: str = "device"
    iommu_port: int | None = None
    destination_killed: bool = False

    @property
    def restarts(self) -> bool:
        """Whether a process of the device is killed and started again."""
        return self.killed or self.destination_killed

    @property
    def _type(self) -> type[VirtioDevice]:
        return parse_device(self.options.device)[0]

    @property
    def has_workload(self) -> bool:
        """Whether the guests' workload runs on the device."""
        return self._type.has_workload

    @property
    def driver(self) -> Driver:
        return Driver(*self._type.linux)

    @property
    def direct(self) -> bool:
        return self.has_workload and not self._type.is_network

    def adapt(self, workload: Workload) -> Workload:
        return on_network(workload) if self._type.is_network else workload

    def __post_init__(self) -> None:
        if self.restarts and not self._type.restartable:
            raise UsageError(
                f"device {self.options.device} cannot be killed and started again, because QEMU "
                "does not store its in-flight requests; choose another device"
            )

    @property
    def facts(self) -> DeviceFacts:
        options = self.options
        return DeviceFacts(
            options.device,
            self.queues,
            self.ring,
            options.tracker,
            options.harvest,
            options.fault,
            self.killed,
            self.destination_killed,
        )

    @property
    def guests(self) -> Collection[str]:
        return self._type.guests

    def options_with_state(self, folder: Path) -> DeviceOptions:
        """Return the options of a process whose disk outlives the process in `folder`."""
        device = self.options.device
        if "file" in self._type.options and "file=" not in device:
            device += f"{',' if ':' in device else ':'}file={option_value(folder / 'disk')}"
        return replace(self.options, device=device)

    def qemu_arguments(self, socket: Path) -> list[str]:
        """Return the QEMU arguments that attach the device over `socket`.

        If the device is to be killed, QEMU listens at `socket`: for QEMU to reconnect, it would
        need an option whose name differs between versions.
        """
        chardev = f"socket,id={self.name},path={option_value(socket)}"
        if self.restarts:
            chardev += ",server=on,wait=off"
        properties = ["packed=on"] if self.ring == "packed" else []
        port = []
        if self.iommu_port is not None:
            port = device_port(self.iommu_port)
            properties += behind_iommu(self.iommu_port)
        return [
            *port,
            *("-chardev", chardev),
            *self._type.qemu_arguments(self.name, self.queues, properties),
        ]

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        attached = _AttachedDevice(self, folder, timeout_s)
        try:
            await attached.start()
            yield attached
        finally:
            await attached.end()


class _AttachedDevice(AttachedDevice):
    """A started device: one process serves both sides, or each side has its own if one is killed.

    (QEMU 7.2 does not reconnect to a device that it lost before the device was started.)
    """

    def __init__(self, setup: EmulatedDevice, folder: Path, timeout_s: float) -> None:
        self._setup = setup
        self._folder = folder
        self._timeout_s = timeout_s
        self._sockets = {
            side: folder / f"{side}-{setup.name}.sock" for side in (SOURCE, DESTINATION)
        }
        self._options = setup.options
        self._devices: dict[str, Device] = {}
        self._changed = asyncio.Condition()
        self._state: Path | None = None
        if setup.restarts:
            self._state = folder / f"{setup.name}-state"
            self._state.mkdir()
            self._options = setup.options_with_state(self._state)

    async def start(self) -> None:
        if self._setup.restarts:
            for side in self._sockets:
                await self._start_for(side)
            return
        device = await Device.start(
            self._options,
            self._sockets,
            self._folder,
            timeout_s=self._timeout_s,
            name=self._setup.name,
        )
        self._devices = dict.fromkeys(self._sockets, device)

    async def _start_for(self, side: str) -> None:
        device = await Device.start(
            self._options,
            {side: self._sockets[side]},
            self._folder,
            timeout_s=self._timeout_s,
            name=f"{side} {self._setup.name}",
            state=self._state,
        )
        async with self._changed:
            self._devices[side] = device
            self._changed.notify_all()

    async def end(self) -> None:
        for device in set(self._devices.values()):
            await device.end()

    @property
    def processes(self) -> Sequence[Process]:
        return [device.process for device in dict.fromkeys(self._devices.values())]

    def serving(self, side: str) -> Sequence[Process]:
        return [self._devices[side].process]

    async def attach(self, side: str) -> Sequence[str]:
        return self._setup.qemu_arguments(self._sockets[side])

    @property
    def is_killed(self) -> bool:
        return self._setup.killed

    async def inject_restart(self, side: str) -> None:
        if self._setup.killed:
            await self.kill(side)
            await self.start_again(side)
            await self._devices[side].wait_for("logging", side)

    @property
    def is_killed_on_destination(self) -> bool:
        return self._setup.destination_killed

    async def kill(self, side: str) -> None:
        await self._devices[side].kill()

    async def start_again(self, side: str) -> None:
        await self._start_for(side)

    async def refusal(self) -> UntestableError:
        while True:
            devices = list(self._devices.values())
            waiting = {device.refused for device in devices} | {device.silent for device in devices}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for device in devices:
                if device.refused.done():
                    return device.refused.result()
            async with self._changed:
                while devices == list(self._devices.values()):  # until one has been replaced
                    await self._changed.wait()

    async def logging_ended(self, side: str) -> None:
        await self._devices[side].logging_ended(side)

    def accepted_features(self, side: str) -> int | None:
        return self._devices[side].accepted_features(side)

    async def evidence(self, side: str) -> Sequence[Evidence]:
        accepted = self.accepted_features(side)
        if accepted is not None and bool(accepted & F_RING_PACKED) != (
            self._setup.ring == "packed"
        ):
            raise UntestableError(
                f"the guest of the {side} QEMU does not use {self._setup.ring} rings; use a guest "
                "whose driver supports them"
            )
        if (
            accepted is not None
            and self._setup.iommu_port is not None
            and not accepted & F_ACCESS_PLATFORM
        ):
            raise UntestableError(
                f"the {side} QEMU has not put the device behind its IOMMU: the accepted features "
                f"{accepted:#x} lack VIRTIO_F_ACCESS_PLATFORM"
            )
        folder = self._folder / f"{side}-{self._setup.name}-evidence"
        folder.mkdir(exist_ok=True)
        evidence = await self._devices[side].evidence(side, folder)
        return [replace(evidence, device=self._setup.facts.device)]
