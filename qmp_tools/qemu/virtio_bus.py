"""QEMU's arguments for virtio devices on another bus than PCI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_PCI: Final = "-pci"
_ONLY_ON_PCI: Final = ("vectors=", "romfile=")


def on_bus(bus: str, arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with the virtio devices of PCI on `bus`, such as 'ccw'.

    QEMU's names of a virtio device differ only in their end: virtio-net-pci, virtio-net-ccw.
    """
    if bus == _PCI.removeprefix("-"):
        return [*arguments]
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [
        word
        for option, value in pairs
        for word in (option, _moved(bus, value) if option == "-device" else value)
    ]


def _moved(bus: str, device: str) -> str:
    name, *properties = device.split(",")
    if ("virtio-" not in name and "vhost-" not in name) or not name.endswith(_PCI):
        return device
    kept = [text for text in properties if not text.startswith(_ONLY_ON_PCI)]
    return ",".join((f"{name.removesuffix(_PCI)}-{bus}", *kept))
