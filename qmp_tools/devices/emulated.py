"""A device of ours, with a tracker and a journal, in a process that serves both QEMUs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from dmaproof.errors import UntestableError
from dmaproof.evidence import Evidence

from ..guest.linux import VIRTIO_BLK, Driver
from ..guest.workload import Workload
from ..processes.device import Device, DeviceOptions
from ..processes.machine import DESTINATION, SOURCE, vhost_user_blk_arguments
from ..processes.process import Process
from .device import AttachedDevice, DeviceFacts


@dataclass(frozen=True)
class EmulatedDevice:
    """See `ProofDevice`. A disk with so many `queues`."""

    options: DeviceOptions
    queues: int = 2

    guests: ClassVar[Collection[str]] = ("bare", "linux")
    driver: ClassVar[Driver] = VIRTIO_BLK
    direct: ClassVar[bool] = True

    @property
    def facts(self) -> DeviceFacts:
        """See `ProofDevice.facts`."""
        options = self.options
        return DeviceFacts(
            options.device, self.queues, options.tracker, options.harvest, options.fault
        )

    def fit(self, workload: Workload) -> Workload:
        """See `ProofDevice.fit`."""
        return workload

    def with_fault(self, fault: str) -> EmulatedDevice:
        """See `ProofDevice.with_fault`."""
        return replace(self, options=replace(self.options, fault=fault))

    @asynccontextmanager
    async def start(self, folder: Path) -> AsyncIterator[AttachedDevice]:
        """See `ProofDevice.start`."""
        sockets = {side: folder / f"{side}-disk.sock" for side in (SOURCE, DESTINATION)}
        device = await Device.start(self.options, sockets, folder)
        try:
            yield _AttachedDevice(self, device, folder)
        finally:
            await device.end()


class _AttachedDevice:
    def __init__(self, setup: EmulatedDevice, device: Device, folder: Path) -> None:
        self.processes: Sequence[Process] = (device.process,)
        self._setup = setup
        self._device = device
        self._folder = folder

    async def attach(self, side: str) -> Sequence[str]:
        return vhost_user_blk_arguments(self._folder / f"{side}-disk.sock", self._setup.queues)

    def release(self, side: str) -> None:
        pass  # it serves the other side too, and whoever comes next

    async def refusal(self) -> UntestableError:
        return await asyncio.shield(self._device.refused)

    async def logging_ended(self, side: str) -> None:
        await self._device.logging_ended(side)

    def accepted_features(self, side: str) -> int | None:
        return self._device.accepted_features(side)

    async def evidence(self, side: str) -> Evidence | None:
        return await self._device.evidence(side, self._folder)
