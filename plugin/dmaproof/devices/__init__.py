"""Emulated virtio devices: each a class with the virtio part only, in a file of its own.

A device file defines one class with a `name`; `emulated_devices` finds it by walking this package,
so a new device is one new file. What QEMU has to be told of it stands there too. A device is asked
for as ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.
"""

from __future__ import annotations

import sys
from typing import Any

from ..discovery import named_classes
from ..errors import UsageError
from .device import VirtioDevice

__all__ = ["VirtioDevice", "emulated_devices", "make_device", "parse_device"]


def emulated_devices() -> dict[str, type[VirtioDevice]]:
    """The devices of this package by name; call one to make a device of its default form."""
    return dict(named_classes(sys.modules[__name__]))


def parse_device(text: str) -> tuple[type[VirtioDevice], dict[str, Any]]:
    """The class, and its arguments, of the device that ``NAME[:OPTION=VALUE,…]`` asks for.

    A comma in a value is doubled.

    Raises:
        UsageError: there is no such device or option, or it cannot have that value.
    """
    name, _, options = text.partition(":")
    known = emulated_devices()
    if name not in known:
        raise UsageError(f"device {name!r} is not known; there are: {', '.join(sorted(known))}")
    arguments = {}
    for pair in _pairs(options):
        option, _, value = pair.partition("=")
        convert = known[name].options.get(option)
        if convert is None:
            there_are = ", ".join(known[name].options) or "none"
            raise UsageError(f"device {name} has no option {option!r}; there are: {there_are}")
        try:
            arguments[option] = convert(value)
        except ValueError:
            raise UsageError(f"device {name}: {pair} is not understood") from None
    return known[name], arguments


def _pairs(options: str) -> list[str]:
    """The parts between single commas: a doubled one belongs to a value, as with QEMU's options."""
    pairs = options.replace(",,", "\0").split(",")
    return [pair.replace("\0", ",") for pair in pairs if pair]


def make_device(text: str) -> VirtioDevice:
    """The device that ``NAME[:OPTION=VALUE,…]`` asks for.

    Raises:
        UsageError: there is none, or it cannot be made so.
    """
    make, arguments = parse_device(text)
    return make(**arguments)
