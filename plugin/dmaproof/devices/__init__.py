"""Emulated virtio devices: each a class with the virtio part only, in a file of its own.

A device file defines one class with a `name`, so a new device is one new file. What QEMU has to be
told of it stands there too. `emulated_devices` finds them, and those of other distributions. A
device is asked for as ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from ..discovery import Registry
from ..errors import UsageError
from .device import VirtioDevice

__all__ = ["VirtioDevice", "emulated_devices", "make_device", "parse_device"]


@functools.cache
def emulated_devices() -> Registry[VirtioDevice]:
    """Find the devices: dmaproof's own, and those of entry points (group ``dmaproof.devices``).

    Returns:
        The classes by name; call one to make a device of its default form.

    Example:
        >>> device = emulated_devices()["rng"]()
        >>> device.queues
        1
    """
    return Registry("device", VirtioDevice, sys.modules[__name__])


def parse_device(text: str) -> tuple[type[VirtioDevice], dict[str, Any]]:
    """Find the class, and its arguments, of the device that a user asks for.

    Args:
        text: ``NAME[:OPTION=VALUE,…]``; a comma in a value is doubled.

    Returns:
        The class, and the arguments to call it with.

    Raises:
        UsageError: there is no such device or option, or it cannot have that value.
    """
    name, _, options = text.partition(":")
    make = emulated_devices().find(name)
    arguments = {}
    for pair in _pairs(options):
        option, _, value = pair.partition("=")
        convert = make.options.get(option)
        if convert is None:
            there_are = ", ".join(make.options) or "none"
            raise UsageError(f"device {name} has no option {option!r}; there are: {there_are}")
        try:
            arguments[option] = convert(value)
        except ValueError:
            raise UsageError(f"device {name}: {pair} is not understood") from None
    return make, arguments


def _pairs(options: str) -> list[str]:
    """The parts between single commas: a doubled one belongs to a value, as with QEMU's options."""
    pairs = options.replace(",,", "\0").split(",")
    return [pair.replace("\0", ",") for pair in pairs if pair]


def make_device(text: str) -> VirtioDevice:
    """Make the device that a user asks for.

    Args:
        text: ``NAME[:OPTION=VALUE,…]``; a comma in a value is doubled.

    Returns:
        The device.

    Raises:
        UsageError: there is none, or it cannot be made so.

    Example:
        >>> make_device("rng").name
        'rng'
    """
    make, arguments = parse_device(text)
    return make(**arguments)
