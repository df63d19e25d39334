"""QEMU's arguments for devices behind a PCI Express root port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_PORT: Final = "pcie-root-port"


def root_port(name: str, number: int) -> list[str]:
    """Return the QEMU arguments of a PCI Express root port with the id `name`.

    The `number` of each port must be different.
    """
    return ["-device", f"{_PORT},id={name},chassis={number}"]


def device_port(number: int) -> list[str]:
    """Return the QEMU arguments of the root port ``port-NUMBER`` of a device."""
    return root_port(f"port-{number}", number)


def behind_iommu(port: int) -> list[str]:
    """Return the options of a virtio device that uses IOVAs and has an IOTLB.

    The option iommu_platform offers VIRTIO_F_ACCESS_PLATFORM. QEMU reports removed mappings to the
    device only if the device has ATS (PCI's address translation services), and only devices behind
    a root port can have ATS (virtio_pci_realize).
    """
    return [f"bus=port-{port}", "iommu_platform=on", "ats=on"]


def is_port(device: str) -> bool:
    """Return whether a value of ``-device`` is a root port."""
    return device.partition(",")[0] == _PORT


def behind_ports(arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with a root port of its own for each device that names no bus."""
    found: list[str] = []
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    for number, (option, value) in enumerate(pairs, 1):
        bus = ""
        if option == "-device" and not is_port(value) and ",bus=" not in value:
            found += device_port(number)
            bus = f",bus=port-{number}"
        found += [option, value + bus]
    return found
