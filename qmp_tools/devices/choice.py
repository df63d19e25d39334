"""Which devices a proof is to have, from what the command line says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from dmaproof.devices import emulated_devices
from dmaproof.errors import UsageError

from . import command, inside_qemu
from .device import ProofDevice
from .emulated import EmulatedDevice
from .process import DeviceOptions
from .several import SeveralDevices

INSIDE_QEMU: Final = "qemu:"
_PASSED_THROUGH: Final = ("vfio-fake", "vfio:SOURCE,DESTINATION")
"""What subcommand prove carries out by itself (docs/passthrough.md)."""


def choose_device(
    names: Sequence[str],
    device_command: str | None,
    options: DeviceOptions,
    queues: int,
    ring: str = "split",
    *,
    killed: bool = False,
    behind_iommu: bool = False,
) -> ProofDevice:
    """The devices called `names`: of ours, served by `device_command`, or inside QEMU.

    `options` are for those of ours, as are `ring` and whether they are to be `killed`, or are
    `behind_iommu`.

    Raises:
        UsageError: there is no such device, or they do not go together.
    """
    devices: list[ProofDevice] = []
    for number, name in enumerate(names, 1):
        if device_command is not None:
            devices.append(_served_by(device_command, name, queues))
        elif name.startswith(INSIDE_QEMU):
            devices.append(inside_qemu.InsideQemu(name.removeprefix(INSIDE_QEMU), queues))
        elif name.partition(":")[0] in emulated_devices():
            own = replace(options, device=name)
            called = f"device-{number}" if number > 1 else "device"
            port = number if behind_iommu else None
            devices.append(EmulatedDevice(own, queues, ring, killed, called, port))
        else:
            raise _unknown(name)
    if not any(_has_workload(device) for device in devices):
        raise UsageError(
            f"--device {' and '.join(names)}: the guest needs a disk beside it to work on: "
            "--device blk"
        )
    others = [device for device in devices if not isinstance(device, EmulatedDevice)]
    if others and (killed or behind_iommu or ring != "split"):
        raise UsageError(
            f"--device {others[0].facts.device}: --ring, --iommu and --kill-device are for "
            "dmaproof's own"
        )
    if others and len(devices) > 1:
        raise UsageError(
            f"--device {others[0].facts.device}: only dmaproof's own go together, which keep "
            "journals"
        )
    return devices[0] if len(devices) == 1 else SeveralDevices(devices)


def _has_workload(device: ProofDevice) -> bool:
    return not isinstance(device, EmulatedDevice) or device.has_workload


def _served_by(device_command: str, name: str, queues: int) -> ProofDevice:
    if name not in command.KINDS:
        raise UsageError(f"--device {name}: --device-command can serve {', '.join(command.KINDS)}")
    return command.CommandDevice(name, command.parse_command(device_command), queues)


def _unknown(name: str) -> UsageError:
    if name in command.KINDS:
        return UsageError(f"--device {name} needs a --device-command that serves it")
    return UsageError(
        f"--device {name} is unknown. There are {', '.join(emulated_devices())}; "
        f"with a --device-command {', '.join(command.KINDS)}; of QEMU's own "
        f"{', '.join(INSIDE_QEMU + name for name in inside_qemu.KINDS)}; and passed through to "
        f"the guest {', '.join(_PASSED_THROUGH)}"
    )
