"""The virtual IOMMUs that a proof's devices can be put behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Iommu:
    """One of them: what QEMU is told of it, before the devices, and what the Linux guest.

    `guests` are those that map what they give to devices so.
    """

    summary: str
    qemu_arguments: tuple[str, ...]
    linux_options: str
    guests: tuple[str, ...]


_INTEL: Final = ("-device", "intel-iommu,device-iotlb=on,intremap=off")

IOMMUS: Final = {
    "intel": Iommu(
        "VT-d; each mapping goes as soon as its request is done",
        _INTEL,
        "intel_iommu=on iommu.strict=1",
        ("bare", "linux"),
    ),
    "intel-lazy": Iommu(
        "VT-d; the guest takes mappings away in batches, and the rings' with them",
        _INTEL,
        "intel_iommu=on iommu.strict=0",
        ("linux",),
    ),
}


def root_port(number: int) -> list[str]:
    """The QEMU arguments of a PCI Express root port."""
    return ["-device", f"pcie-root-port,id=port-{number},chassis={number}"]


def behind_iommu(port: int) -> list[str]:
    """What makes a virtio device take IOVAs (VIRTIO_F_ACCESS_PLATFORM), and have an IOTLB.

    QEMU tells that of what is taken away if it has ATS, PCI's address translation services, which
    only devices behind a root port have (virtio_pci_realize).
    """
    return [f"bus=port-{port}", "iommu_platform=on", "ats=on"]
