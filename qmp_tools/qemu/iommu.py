"""The virtual IOMMUs that a proof can put its devices behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Iommu:
    """A virtual IOMMU: QEMU's arguments, which precede the devices', and the Linux guest's options.

    `guests` names the guests that support it.
    """

    summary: str
    qemu_arguments: tuple[str, ...]
    linux_options: str
    guests: tuple[str, ...]


_INTEL: Final = ("-device", "intel-iommu,device-iotlb=on,intremap=off")

IOMMUS: Final = {
    "intel": Iommu(
        "VT-d; the guest removes each mapping as soon as its request is done",
        _INTEL,
        "intel_iommu=on iommu.strict=1",
        ("bare", "linux"),
    ),
    "intel-lazy": Iommu(
        "VT-d; the guest removes mappings in batches, those of the rings included",
        _INTEL,
        "intel_iommu=on iommu.strict=0",
        ("linux",),
    ),
}


def root_port(number: int) -> list[str]:
    """Return the QEMU arguments of a PCI Express root port."""
    return ["-device", f"pcie-root-port,id=port-{number},chassis={number}"]


def behind_iommu(port: int) -> list[str]:
    """Return the options of a virtio device that uses IOVAs and has an IOTLB.

    The option iommu_platform offers VIRTIO_F_ACCESS_PLATFORM. QEMU reports removed mappings to the
    device only if the device has ATS (PCI's address translation services), and only devices behind
    a root port can have ATS (virtio_pci_realize).
    """
    return [f"bus=port-{port}", "iommu_platform=on", "ats=on"]
