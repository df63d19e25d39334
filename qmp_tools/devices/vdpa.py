"""Use a vDPA device that L1's kernel makes without hardware, through QEMU's vhost-vdpa.

The kernel simulates a network card, and offers devices that a process serves (VDUSE). The program
``vdpa`` makes one device for each side, and QEMU opens it as /dev/vhost-vdpa-N. All of this happens
in L1.

QEMU reads no dirty log of a vDPA device. When a migration starts, QEMU puts shadow virtqueues
between the guest and the device, and marks dirty what the device's used ring covers.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError
from dmaproof.evidence import Evidence
from dmaproof.faults import make_fault
from dmaproof.faults.log import DropPages

from ..guest.workload import Workload
from ..host.captured import run_captured
from ..host.process import Process
from ..qemu.machine import DESTINATION, SOURCE, option_value
from .device import AttachedDevice, DeviceFacts, ProofDevice, on_network
from .process import Device, DeviceOptions
from .registry import COMMON_OPTIONS, DeviceKind, DeviceRequest, is_l1

_MAC: Final = "52:54:00:12:34:56"
"""On both sides, because a network card keeps its address (see also `dmaproof.vduse.__main__`)."""
_VDPA_DEVICES: Final = Path("/sys/bus/vdpa/devices")
_VDUSE_DEVICES: Final = Path("/dev/vduse")
_SHADOWED: Final = "svq"
_OPTIONS: Final = COMMON_OPTIONS - {"arch", "numa"} | {"guest", "l1_kernel"}


@dataclass(frozen=True)
class VdpaDevice(ProofDevice):
    """One vDPA network card for each side, of the management device `management`."""

    name: ClassVar[str]
    management: ClassVar[str]
    guests: ClassVar[Collection[str]] = ("bare",)

    is_shadowed: bool = False
    """Whether QEMU shadows the virtqueues of a network card from the start."""

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(f"{self.name}:{_SHADOWED}" if self.is_shadowed else self.name, 2)

    @property
    def direct(self) -> bool:
        return False

    def adapt(self, workload: Workload) -> Workload:
        return on_network(workload)

    def qemu_arguments(self, file: Path) -> Sequence[str]:
        """Return QEMU's arguments for the vDPA device that it opens as `file`."""
        opened = f"vhostdev={option_value(file)}{',x-svq=on' if self.is_shadowed else ''}"
        return [
            *("-netdev", f"vhost-vdpa,id=net,{opened}"),
            *("-device", f"virtio-net-pci,netdev=net,mac={_MAC},vectors=0,romfile="),
        ]

    @asynccontextmanager
    async def served(
        self, names: Mapping[str, str], folder: Path, timeout_s: float
    ) -> AsyncIterator[Device | None]:
        """Start what serves the devices, whose `names` are by side; by default the kernel does."""
        yield None

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        names = {side: f"dmaproof-{os.getpid()}-{side}" for side in (SOURCE, DESTINATION)}
        async with self.served(names, folder, timeout_s) as server:
            with ExitStack() as devices:
                files = {
                    side: devices.enter_context(_vdpa_device(self, name, timeout_s))
                    for side, name in names.items()
                }
                yield _Attached(self, files, server, folder)


@dataclass(frozen=True)
class SimulatedCard(VdpaDevice):
    """The kernel's simulated network card, which sends every frame back"""

    name = "vdpa-net"
    management = "vdpasim_net"


@dataclass(frozen=True)
class OwnCard(VdpaDevice):
    """dmaproof's own network card in user space (VDUSE), with a journal"""

    name = "vduse-net"
    management = "vduse"

    fault: str | None = None
    seed: int = 1

    @property
    def facts(self) -> DeviceFacts:
        name = f"{self.name}:{_SHADOWED}" if self.is_shadowed else self.name
        return DeviceFacts(name, 2, tracker="used-length", fault=self.fault)

    @asynccontextmanager
    async def served(
        self, names: Mapping[str, str], folder: Path, timeout_s: float
    ) -> AsyncIterator[Device | None]:
        files = {side: _VDUSE_DEVICES / name for side, name in names.items()}
        options = _OwnOptions(fault=self.fault, seed=self.seed)
        device = await Device.start(options, files, folder, timeout_s=timeout_s)
        try:
            yield device
        finally:
            await device.end()


@dataclass(frozen=True)
class _OwnOptions(DeviceOptions):
    module: ClassVar[str] = "dmaproof.vduse"

    def arguments(self) -> list[str]:
        return ["--seed", str(self.seed), *(("--fault", self.fault) if self.fault else ())]


class _Attached(AttachedDevice):
    def __init__(
        self,
        setup: VdpaDevice,
        files: Mapping[str, Path],
        server: Device | None,
        folder: Path,
    ) -> None:
        self._setup = setup
        self._files = files
        self._server = server
        self._folder = folder

    @property
    def processes(self) -> Sequence[Process]:
        return [] if self._server is None else [self._server.process]

    async def attach(self, side: str) -> Sequence[str]:
        return self._setup.qemu_arguments(self._files[side])

    async def refusal(self) -> UntestableError:
        if self._server is None:
            return await super().refusal()
        return await asyncio.shield(self._server.refused)

    async def evidence(self, side: str) -> Sequence[Evidence]:
        if self._server is None:
            return []
        folder = self._folder / f"{side}-evidence"
        folder.mkdir(exist_ok=True)
        return [await self._server.evidence(side, folder)]


@contextmanager
def _vdpa_device(setup: VdpaDevice, name: str, timeout_s: float) -> Iterator[Path]:
    """Make a vDPA device, and yield the file that QEMU opens.

    Raises:
        UntestableError: the device cannot be made, or QEMU cannot open it.
    """
    mac = ["mac", _MAC] if setup.management == SimulatedCard.management else []
    _vdpa("dev", "add", "name", name, "mgmtdev", setup.management, *mac, timeout_s=timeout_s)
    try:
        found = next((_VDPA_DEVICES / name).glob("vhost-vdpa-*"), None)
        if found is None:
            raise UntestableError(
                f"the vDPA device {name} has no driver by which QEMU could open it: load the "
                "module vhost_vdpa, and unload virtio_vdpa"
            )
        yield Path("/dev") / found.name
    finally:
        _vdpa("dev", "del", name, timeout_s=timeout_s)


def _vdpa(*arguments: str, timeout_s: float) -> None:
    """Run the program vdpa.

    Raises:
        UntestableError: it failed; the message has its words.
    """
    program = shutil.which("vdpa")
    if program is None:
        raise UntestableError(
            "the program vdpa, which makes vDPA devices, is missing: install the package iproute2"
        )
    try:
        done = run_captured([program, *arguments], timeout_s=timeout_s)
    except subprocess.TimeoutExpired:
        raise WaitTimeoutError(
            f"vdpa {' '.join(arguments)} has not ended within {timeout_s:g} s; allow more time "
            "(--timeout)"
        ) from None
    if done.returncode:
        raise UntestableError(
            f"vdpa {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}"
        )


class _VdpaKind(DeviceKind):
    """vDPA devices."""

    devices: ClassVar[Sequence[type[VdpaDevice]]]

    def names(self) -> Sequence[str]:
        """Return the names of the devices, and those with always-on shadows."""
        shadowed = f":{_SHADOWED}"
        return [name for each in self.devices for name in (each.name, each.name + shadowed)]

    def summary(self, name: str) -> str:
        """Return what the device is."""
        what = (self._device(name).__doc__ or "").strip()
        return f"{what}; QEMU always shadows its queues" if ":" in name else what

    def claims(self, name: str) -> bool:
        """Return whether a device has the name, which a colon and an option may follow."""
        return any(name.partition(":")[0] == device.name for device in self.devices)

    def runs_here(self) -> bool:
        """Return whether this machine is L1: a vDPA device would stay if dmaproof was killed."""
        return is_l1()

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Return the device."""
        (name,) = request.names
        if name not in self.names():
            raise UsageError(f"--device {name}: expected one of {', '.join(self.names())}")
        return self._made(self._device(name), ":" in name, request)

    def _made(
        self, device: type[VdpaDevice], is_shadowed: bool, request: DeviceRequest
    ) -> VdpaDevice:
        return device(is_shadowed)

    def _device(self, name: str) -> type[VdpaDevice]:
        return next(device for device in self.devices if device.name == name.partition(":")[0])


class VdpaKind(_VdpaKind):
    """A vDPA device that keeps no journal."""

    name = "vdpa"
    accepts = _OPTIONS | {"settle"}
    devices = (SimulatedCard,)


class OwnVdpaKind(_VdpaKind):
    """dmaproof's own vDPA device, with a journal."""

    name = "vdpa-own"
    accepts = _OPTIONS | {"fault"}
    devices = (OwnCard,)

    def _made(
        self, device: type[VdpaDevice], is_shadowed: bool, request: DeviceRequest
    ) -> VdpaDevice:
        fault, seed = request.options.fault, request.options.seed
        if fault and not isinstance(make_fault(fault, seed), DropPages):
            raise UsageError(
                f"--fault {fault}: the only link of --device {OwnCard.name} is the length in its "
                f"used ring; expected {DropPages.name}"
            )
        return OwnCard(is_shadowed, fault, seed)
