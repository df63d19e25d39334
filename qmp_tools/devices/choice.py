"""Which device a proof is to have, from what the command line says."""

from __future__ import annotations

from typing import Final

from dmaproof.devices import emulated_devices
from dmaproof.errors import UsageError

from ..processes.device import DeviceOptions
from . import command, inside_qemu
from .device import ProofDevice
from .emulated import EmulatedDevice

INSIDE_QEMU: Final = "qemu:"


def choose_device(
    name: str, device_command: str | None, options: DeviceOptions, queues: int
) -> ProofDevice:
    """The device called `name`: of ours, served by `device_command`, or inside QEMU.

    `options` are for one of ours.

    Raises:
        UsageError: there is no such device.
    """
    if device_command is not None:
        if name not in command.KINDS:
            raise UsageError(
                f"--device {name}: --device-command can serve {', '.join(command.KINDS)}"
            )
        words = command.parse_command(device_command)
        return command.CommandDevice(name, words, queues)
    if name.startswith(INSIDE_QEMU):
        return inside_qemu.InsideQemu(name.removeprefix(INSIDE_QEMU), queues)
    if name in emulated_devices():
        return EmulatedDevice(options, queues)
    if name in command.KINDS:
        raise UsageError(f"--device {name} needs a --device-command that serves it")
    raise UsageError(
        f"--device {name}: there are {', '.join(emulated_devices())}, and of QEMU's own "
        f"{', '.join(INSIDE_QEMU + name for name in inside_qemu.KINDS)}"
    )
