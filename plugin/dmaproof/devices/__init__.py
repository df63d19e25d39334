"""Emulated virtio devices: each one a class with only the virtio part, in a file of its own.

A device file defines one class with a `name`, so a new device is one new file. The class also has
the QEMU arguments of the device. `emulated_devices` finds these classes, and those of other
distributions. Users name a device as ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.
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
    """Find dmaproof's devices and those of entry points (group ``dmaproof.devices``).

    Returns:
        The classes by name; call a class to make the device with its default options.

    Example:
        >>> device = emulated_devices()["rng"]()
        >>> device.queues
        1
    """
    return Registry("device", VirtioDevice, sys.modules[__name__])


def parse_device(text: str) -> tuple[type[VirtioDevice], dict[str, Any]]:
    """Find the class and the arguments of the device that a user asks for.

    Args:
        text: ``NAME[:OPTION=VALUE,…]``; a comma in a value is doubled.

    Returns:
        The class, and the arguments to call it with.

    Raises:
        UsageError: the device or an option does not exist, or a value is invalid.
    """
    name, _, options = text.partition(":")
    make = emulated_devices().find(name)
    arguments = {}
    for pair in _pairs(options):
        option, _, value = pair.partition("=")
        convert = make.options.get(option)
        if convert is None:
            known = ", ".join(make.options) or "none"
            raise UsageError(f"device {name} has no option {option!r}; its options: {known}")
        try:
            arguments[option] = convert(value)
        except ValueError:
            raise UsageError(f"device {name}: invalid value in {pair!r}") from None
    return make, arguments


def _pairs(options: str) -> list[str]:
    """Split at single commas; a doubled comma belongs to a value, as in QEMU's options."""
    pairs = options.replace(",,", "\0").split(",")
    return [pair.replace("\0", ",") for pair in pairs if pair]


def make_device(text: str) -> VirtioDevice:
    """Make the device that a user asks for.

    Args:
        text: ``NAME[:OPTION=VALUE,…]``; a comma in a value is doubled.

    Returns:
        The device.

    Raises:
        UsageError: the device or an option does not exist, or a value is invalid.

    Example:
        >>> make_device("rng").name
        'rng'
    """
    make, arguments = parse_device(text)
    return make(**arguments)
