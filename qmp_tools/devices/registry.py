"""Find the kinds of device that a proof can use, and the options that each kind accepts.

Another distribution declares a kind as an entry point of the group ``dmaproof.device_kinds``, whose
value is a subclass of `DeviceKind`. So does dmaproof itself for a kind outside this package::

    [project.entry-points."dmaproof.device_kinds"]
    vfio = "qmp_tools.passthrough.kinds:HostFunctionsKind"
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Final

from dmaproof.devices import emulated_devices
from dmaproof.discovery import Registry
from dmaproof.errors import UnsupportedError, UsageError
from dmaproof.trace import Link

from . import command, inside_qemu
from .device import ProofDevice
from .emulated import EmulatedDevice
from .process import DeviceOptions
from .several import SeveralDevices
from .udp_echo import free_udp_port

QEMU_OPTIONS: Final = frozenset(
    {
        *("arch", "qemu", "qemu_destination", "machine", "accel", "cpus"),
        *("memory", "memory_backend", "numa"),
    }
)
MIGRATION_OPTIONS: Final = frozenset(
    {
        *("scenario", "capability", "parameter", "host"),
        *("bandwidth", "downtime_limit", "max_downtime", "timeout"),
    }
)
PROOF_OPTIONS: Final = frozenset({"device", "workload", "seed", "requests_after"})
COMMON_OPTIONS: Final = QEMU_OPTIONS | MIGRATION_OPTIONS | PROOF_OPTIONS
"""The options of a proof that apply to any device, for `DeviceKind.accepts`."""
GUEST_OPTIONS: Final = frozenset({"guest", "guest_pages", "kernel", "modules"})
"""The options of a proof that apply to devices that dmaproof's guests drive."""


IN_L1: Final = "DMAPROOF_L1"
"""The environment variable that says that this machine is the nested machine L1."""


def is_l1() -> bool:
    """Return whether this machine is the nested machine L1, which ends with the proof.

    A device that would stay if dmaproof was killed can be made only there.
    """
    return IN_L1 in os.environ


@dataclass(frozen=True)
class DeviceRequest:
    """The options of a proof about its devices; `names` are the values of ``--device``.

    `command` starts a third party's back end. `options` are those of dmaproof's device process, and
    `ring` is one of `emulated.RINGS`. The devices may be `killed` during the migration, or
    `destination_killed` after it, and may be `behind_iommu`.
    """

    names: Sequence[str]
    command: str | None
    options: DeviceOptions
    queues: int
    ring: str
    killed: bool
    behind_iommu: bool
    destination_killed: bool = False


@dataclass(frozen=True)
class Control:
    """A fault that a proof must detect in a kind of device, and the link that loses the pages."""

    fault: str
    link: Link


def first_line(described: type[object]) -> str:
    """Return the first line of a class's docstring as a text for users."""
    first, _, _ = (described.__doc__ or "").strip().partition("\n")
    return first.replace("`", "").removesuffix(".")


class DeviceKind(ABC):
    """One kind of device that a proof can use, with its own `name`.

    One instance serves all proofs of a process, so it keeps no state of a proof.
    """

    name: ClassVar[str]
    accepts: ClassVar[frozenset[str]]
    """The options of a proof (fields of `proof.options.ProofOptions`) that apply to this kind."""
    several: ClassVar[bool] = False
    """Whether a proof can have several devices of this kind at once."""
    control: ClassVar[Control | None] = None
    """The fault that ``--control`` injects; None if no fault can be injected."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the values of ``--device`` for this kind, for messages."""

    def summary(self, name: str) -> str:
        """Return what ``--device NAME`` is, in one line without a full stop."""
        return first_line(type(self))

    @abstractmethod
    def claims(self, name: str) -> bool:
        """Return whether ``--device NAME`` is a device of this kind."""

    def runs_here(self) -> bool:
        """Return whether this machine can run the device.

        If not, ``dmaproof prove`` carries out the proof in the nested machine L1
        (`passthrough.nested`), which has the device.
        """
        return True

    @abstractmethod
    def make(self, request: DeviceRequest) -> ProofDevice:
        """Make the device, or one object for several devices.

        Raises:
            UsageError: the options do not fit the device.
        """


class EmulatedKind(DeviceKind):
    """dmaproof's own devices, in a process with a tracker and a journal."""

    name = "emulated"
    accepts = COMMON_OPTIONS | {
        *GUEST_OPTIONS,
        *("iommu", "queues", "ring", "tracker", "harvest", "fault"),
        *("destination_lacks", "kill_device", "kill_destination_device"),
    }
    several = True
    control = Control("drop-pages=0.01", Link.LOG)

    def names(self) -> Sequence[str]:
        """Return the names of `emulated_devices`."""
        return sorted(emulated_devices())

    def claims(self, name: str) -> bool:
        """Return whether the name, which options may follow, is one of `emulated_devices`."""
        return name.partition(":")[0] in emulated_devices()

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Make one device, or several with a journal each; one of them must run the workload."""
        devices = [
            EmulatedDevice(
                replace(request.options, device=name),
                request.queues,
                request.ring,
                request.killed,
                f"device-{number}" if number > 1 else "device",
                number if request.behind_iommu else None,
                request.destination_killed,
            )
            for number, name in enumerate(request.names, 1)
        ]
        if not any(device.has_workload for device in devices):
            raise UsageError(
                f"--device {' and '.join(request.names)}: the guest's workload needs a disk; add "
                "--device blk"
            )
        return devices[0] if len(devices) == 1 else SeveralDevices(devices)


class InsideQemuKind(DeviceKind):
    """Devices that QEMU itself emulates."""

    name = "inside-qemu"
    accepts = COMMON_OPTIONS | GUEST_OPTIONS | {"queues", "settle"}
    prefix: ClassVar = "qemu:"

    def names(self) -> Sequence[str]:
        """Return QEMU's names with the prefix."""
        return [self.prefix + name for name in inside_qemu.KINDS]

    def summary(self, name: str) -> str:
        """Return what the device is, and which guests drive it."""
        kind = inside_qemu.KINDS[name.removeprefix(self.prefix)]
        what = "network device" if kind.network else "disk"
        return f"A {what} that QEMU emulates, for --guest {' or '.join(kind.guests)}"

    def claims(self, name: str) -> bool:
        """Return whether the name has the prefix."""
        return name.startswith(self.prefix)

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Make the device with this name."""
        return inside_qemu.InsideQemu(request.names[0].removeprefix(self.prefix), request.queues)


class ThirdPartyKind(DeviceKind):
    """Devices that a vhost-user back end serves, which ``--device-command`` starts."""

    name = "third-party"
    accepts = COMMON_OPTIONS | {
        *GUEST_OPTIONS,
        *("iommu", "queues", "ring", "settle"),
        *("device_command", "kill_device", "kill_destination_device"),
    }

    def names(self) -> Sequence[str]:
        """Return the devices that a back end can serve."""
        return list(command.KINDS)

    def summary(self, name: str) -> str:
        """Return what the device is."""
        return f"A vhost-user {name} device that the back end of --device-command serves"

    def claims(self, name: str) -> bool:
        """Return whether a back end can serve the device.

        With ``--device-command``, all names are of this kind.
        """
        return name in command.KINDS or name in command.NOT_MIGRATED

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Make the device that the command serves."""
        (name,) = request.names
        if name in command.NOT_MIGRATED:
            raise UnsupportedError(
                f"--device {name}: QEMU does not migrate vhost-user-{name}; expected one of "
                f"{', '.join(command.KINDS)} (docs/third-party-devices.md has a table)"
            )
        if name not in command.KINDS:
            raise UsageError(
                f"--device {name}: expected one of {', '.join(command.KINDS)} with --device-command"
            )
        if request.command is None:
            raise UsageError(f"--device {name} needs --device-command, which starts its back end")
        return command.CommandDevice(
            name,
            command.parse_command(request.command),
            request.queues,
            request.ring,
            request.behind_iommu,
            request.killed,
            request.destination_killed,
            udp_port=free_udp_port() if command.KINDS[name].carries_only_ip else 0,
        )


@cache
def device_kinds() -> Registry[DeviceKind]:
    """Find the kinds of device: dmaproof's own, and those of entry points.

    Returns:
        The classes by name.
    """
    return Registry("device kind", DeviceKind, sys.modules[__package__])


def kind_of(names: Sequence[str], device_command: str | None) -> DeviceKind:
    """Return the kind of the devices that ``--device`` names.

    Raises:
        UsageError: a device is unknown, or the devices cannot be combined.
    """
    if not names:
        raise UsageError("--device: expected the name of a device, such as blk")
    known = {name: _made(kind) for name, kind in device_kinds().usable().items()}
    kinds = [
        known[ThirdPartyKind.name] if device_command is not None else _kind_of(name, known)
        for name in names
    ]
    if len(names) > 1:
        single = next(
            (name for name, kind in zip(names, kinds, strict=True) if not kind.several), None
        )
        if single is not None:
            raise UsageError(
                f"--device {single} cannot be combined with other devices: only dmaproof's own "
                "devices can, because they keep journals; use this device alone"
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
        f"--device {name} is unknown; expected one of "
        f"{'; '.join(', '.join(names) for names in named)}; "
        f"or, with --device-command, {', '.join(kinds[ThirdPartyKind.name].names())}"
    )
