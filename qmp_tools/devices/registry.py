"""Which kinds of device a proof can have, and which of its options each kind accepts.

A kind of another distribution is an entry point of the group ``dmaproof.device_kinds``, whose value
is a subclass of `DeviceKind`. So are those of ours that need more than the rooms below::

    [project.entry-points."dmaproof.device_kinds"]
    vfio = "qmp_tools.passthrough.kinds:HostFunctionsKind"
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Final

from dmaproof.devices import emulated_devices
from dmaproof.discovery import Registry
from dmaproof.errors import UsageError
from dmaproof.trace import Link

from . import command, inside_qemu
from .device import ProofDevice
from .emulated import EmulatedDevice
from .process import DeviceOptions
from .several import SeveralDevices

QEMU_OPTIONS: Final = frozenset({"qemu", "qemu_destination", "machine", "accel", "memory", "cpus"})
MIGRATION_OPTIONS: Final = frozenset(
    {"scenario", "host", "bandwidth", "downtime_limit", "max_downtime", "timeout"}
)
PROOF_OPTIONS: Final = frozenset({"device", "workload", "seed", "requests_after"})
COMMON_OPTIONS: Final = QEMU_OPTIONS | MIGRATION_OPTIONS | PROOF_OPTIONS
"""The options of a proof that mean something whatever the device is: for `DeviceKind.accepts`."""


@dataclass(frozen=True)
class DeviceRequest:
    """What the options of a proof say of its devices: `names` as ``--device`` has them.

    `command` is that of a third party's back end, `options` are those of the process of ours, and
    `ring` is one of `emulated.RINGS`. Devices of ours may have to be `killed` in the middle of the
    migration, and to be `behind_iommu`.
    """

    names: Sequence[str]
    command: str | None
    options: DeviceOptions
    queues: int
    ring: str
    killed: bool
    behind_iommu: bool


@dataclass(frozen=True)
class Control:
    """A fault that a kind of device must be caught with, and the link at which pages are lost."""

    fault: str
    link: Link


class DeviceKind(ABC):
    """One kind of device that a proof can have; it has a `name` of its own.

    One instance serves every proof of a process, so it keeps nothing of a proof.
    """

    name: ClassVar[str]
    accepts: ClassVar[frozenset[str]]
    """The options of a proof (fields of `proof.options.ProofOptions`) that mean something here."""
    several: ClassVar[bool] = False
    """Whether a proof can have several devices of this kind at once."""
    control: ClassVar[Control | None] = None
    """What ``--control`` injects; None where nothing can be injected."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """What ``--device`` can name of it, as people are told."""

    @abstractmethod
    def claims(self, name: str) -> bool:
        """Whether ``--device NAME`` is one of this kind."""

    @abstractmethod
    def make(self, request: DeviceRequest) -> ProofDevice:
        """The device, or several as one.

        Raises:
            UsageError: it cannot be made so.
        """


class EmulatedKind(DeviceKind):
    """Devices of dmaproof's own, in a process of ours, with a tracker and a journal."""

    name = "emulated"
    accepts = COMMON_OPTIONS | {
        *("guest", "iommu", "queues", "ring", "tracker", "harvest", "fault"),
        *("destination_lacks", "kill_device"),
    }
    several = True
    control = Control("drop-pages=0.01", Link.LOG)

    def names(self) -> Sequence[str]:
        """The names of `emulated_devices`."""
        return sorted(emulated_devices())

    def claims(self, name: str) -> bool:
        """Whether one of them has this name; options may follow it."""
        return name.partition(":")[0] in emulated_devices()

    def make(self, request: DeviceRequest) -> ProofDevice:
        """One device, or several that keep a journal each; one of them must have the workload."""
        devices = [
            EmulatedDevice(
                replace(request.options, device=name),
                request.queues,
                request.ring,
                request.killed,
                f"device-{number}" if number > 1 else "device",
                number if request.behind_iommu else None,
            )
            for number, name in enumerate(request.names, 1)
        ]
        if not any(device.has_workload for device in devices):
            raise UsageError(
                f"--device {' and '.join(request.names)}: the guest needs a disk beside it to work "
                "on: --device blk"
            )
        return devices[0] if len(devices) == 1 else SeveralDevices(devices)


class InsideQemuKind(DeviceKind):
    """Devices that QEMU itself emulates."""

    name = "inside-qemu"
    accepts = COMMON_OPTIONS | {"guest", "queues", "settle"}
    prefix: ClassVar = "qemu:"

    def names(self) -> Sequence[str]:
        """QEMU's own names behind the prefix."""
        return [self.prefix + name for name in inside_qemu.KINDS]

    def claims(self, name: str) -> bool:
        """Whether the name has the prefix."""
        return name.startswith(self.prefix)

    def make(self, request: DeviceRequest) -> ProofDevice:
        """The device of this name."""
        return inside_qemu.InsideQemu(request.names[0].removeprefix(self.prefix), request.queues)


class ThirdPartyKind(DeviceKind):
    """Devices that a vhost-user back end serves, which ``--device-command`` starts."""

    name = "third-party"
    accepts = COMMON_OPTIONS | {"guest", "queues", "settle", "device_command"}

    def names(self) -> Sequence[str]:
        """What a back end can serve."""
        return list(command.KINDS)

    def claims(self, name: str) -> bool:
        """Whether a back end can serve it. With a command, all names are of this kind."""
        return name in command.KINDS

    def make(self, request: DeviceRequest) -> ProofDevice:
        """The device, served by the command."""
        (name,) = request.names
        if name not in command.KINDS:
            raise UsageError(
                f"--device {name}: --device-command can serve {', '.join(command.KINDS)}"
            )
        if request.command is None:
            raise UsageError(f"--device {name} needs a --device-command that serves it")
        return command.CommandDevice(name, command.parse_command(request.command), request.queues)


@cache
def device_kinds() -> Registry[DeviceKind]:
    """Find the kinds of device: dmaproof's own, and those of entry points.

    Returns:
        The classes by name.
    """
    return Registry("device kind", DeviceKind, sys.modules[__package__])


def kind_of(names: Sequence[str], device_command: str | None) -> DeviceKind:
    """The kind of the devices that ``--device`` names.

    Raises:
        UsageError: there is no such device, or they do not go together.
    """
    if not names:
        raise UsageError("--device: expected the name of a device, such as blk")
    known = {name: _made(kind) for name, kind in device_kinds().usable().items()}
    kinds = [
        known[ThirdPartyKind.name] if device_command is not None else _kind_of(name, known)
        for name in names
    ]
    if len(names) > 1:
        alone = next((it for it in zip(names, kinds, strict=True) if not it[1].several), None)
        if alone is not None:
            raise UsageError(
                f"--device {alone[0]}: only dmaproof's own devices go together, which keep "
                "journals; name it alone"
            )
    return kinds[0]


@cache
def _made(kind: type[DeviceKind]) -> DeviceKind:
    return kind()


def _kind_of(name: str, kinds: Mapping[str, DeviceKind]) -> DeviceKind:
    for kind in kinds.values():
        if kind.claims(name):
            return kind
    named = (kind.names() for kind_name, kind in kinds.items() if kind_name != ThirdPartyKind.name)
    raise UsageError(
        f"--device {name} is unknown. There are {'; '.join(', '.join(names) for names in named)}; "
        f"and with a --device-command {', '.join(kinds[ThirdPartyKind.name].names())}"
    )
