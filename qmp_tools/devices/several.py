"""Combine several devices on one QEMU: they share one dirty log, and each has its own evidence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dmaproof.errors import UntestableError
from dmaproof.evidence import Evidence

from ..guest.drivers import Driver
from ..guest.workload import Workload
from ..host.process import Process
from .device import AttachedDevice, DeviceFacts, ProofDevice


@dataclass(frozen=True)
class SeveralDevices(ProofDevice):
    """Several devices as one: each of the `devices` (at least one) is started separately."""

    devices: Sequence[ProofDevice]

    @property
    def facts(self) -> DeviceFacts:
        """The facts of the first device, with all names and the sum of the queues."""
        facts = [device.facts for device in self.devices]
        return replace(
            facts[0],
            device=", ".join(each.device for each in facts),
            queues=sum(each.queues for each in facts),
        )

    @property
    def guests(self) -> Collection[str]:
        """The guests that can drive all devices."""
        first, *others = (device.guests for device in self.devices)
        return [guest for guest in first if all(guest in other for other in others)]

    @property
    def driver(self) -> Driver:
        """The drivers of all devices."""
        drivers = [device.driver for device in self.devices]
        modules = dict.fromkeys(module for driver in drivers for module in driver.modules)
        return Driver(tuple(modules), " ".join(each.place for each in drivers if each.place))

    @property
    def direct(self) -> bool:
        """Whether any device is direct."""
        return any(device.direct for device in self.devices)

    @property
    def commands(self) -> Sequence[Sequence[str]]:
        return [command for device in self.devices for command in device.commands]

    def adapt(self, workload: Workload) -> Workload:
        for device in self.devices:
            workload = device.adapt(workload)
        return workload

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        async with AsyncExitStack() as stack:
            yield AttachedDevices(
                [
                    await stack.enter_async_context(device.start(folder, timeout_s))
                    for device in self.devices
                ]
            )


class AttachedDevices(AttachedDevice):
    """Started devices as one."""

    def __init__(self, devices: Sequence[AttachedDevice]) -> None:
        self._devices = devices

    @property
    def processes(self) -> Sequence[Process]:
        return [process for device in self._devices for process in device.processes]

    def serving(self, side: str) -> Sequence[Process]:
        return [process for device in self._devices for process in device.serving(side)]

    async def attach(self, side: str) -> Sequence[str]:
        return [word for device in self._devices for word in await device.attach(side)]

    def release(self, side: str) -> None:
        for device in self._devices:
            device.release(side)

    @property
    def is_killed(self) -> bool:
        return any(device.is_killed for device in self._devices)

    async def inject_restart(self, side: str) -> None:
        for device in self._devices:
            await device.inject_restart(side)

    @property
    def is_killed_on_destination(self) -> bool:
        return any(device.is_killed_on_destination for device in self._devices)

    async def kill(self, side: str) -> None:
        for device in self._devices:
            await device.kill(side)

    async def start_again(self, side: str) -> None:
        for device in self._devices:
            await device.start_again(side)

    async def refusal(self) -> UntestableError:
        refusals = [asyncio.ensure_future(device.refusal()) for device in self._devices]
        try:
            done, _ = await asyncio.wait(refusals, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for refusal in refusals:
                refusal.cancel()

    async def logging_ended(self, side: str) -> None:
        for device in self._devices:
            await device.logging_ended(side)

    def accepted_features(self, side: str) -> int | None:
        return self._devices[0].accepted_features(side)

    async def evidence(self, side: str) -> Sequence[Evidence]:
        return [each for device in self._devices for each in await device.evidence(side)]
