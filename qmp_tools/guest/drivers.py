"""How Linux drives the devices of a proof: modules, and where the guest finds the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..arch import ARCHITECTURES


@dataclass(frozen=True)
class Driver:
    """How Linux drives a device: by `modules` and their dependencies.

    `place` is an option of ``guests/linux/init.c`` that names the device: a disk's node, a file in
    the virtiofs with a tag, or a network interface.
    """

    modules: Sequence[str]
    place: str

    @property
    def has_disk(self) -> bool:
        """Whether the device is a disk with a node, for which the guest waits until it exists."""
        return "disk=/dev/" in self.place


@dataclass(frozen=True)
class LinuxNeeds:
    """What a scenario needs of the Linux guest.

    Linux drives what the scenario adds to the machine by `modules` and their dependencies.
    `options` are further options of ``guests/linux/init.c``, and `kernel_options` of the kernel.
    """

    modules: Sequence[str]
    options: Sequence[str] = ()
    kernel_options: str = ""


_SCSI_DISK: Final = "disk=/dev/sda"
_NETWORK: Final = "loop=eth0"
VIRTIO_BLK: Final = Driver(("virtio_pci", "virtio_blk"), "disk=/dev/vda")
VIRTIO_SCSI: Final = Driver(("virtio_pci", "virtio_scsi", "sd_mod"), _SCSI_DISK)
VIRTIOFS: Final = Driver(("virtio_pci", "virtiofs"), "disk=/shared/disk shared=disk")
NVME: Final = Driver(("nvme",), "disk=/dev/nvme0n1")
AHCI: Final = Driver(("ahci", "sd_mod"), _SCSI_DISK)
LSI: Final = Driver(("sym53c8xx", "sd_mod"), _SCSI_DISK)
MEGASAS: Final = Driver(("megaraid_sas", "sd_mod"), _SCSI_DISK)
PVSCSI: Final = Driver(("vmw_pvscsi", "sd_mod"), _SCSI_DISK)
VIRTIO_NET: Final = Driver(("virtio_pci", "virtio_net", "af_packet"), _NETWORK)
E1000: Final = Driver(("e1000", "af_packet"), _NETWORK)
E1000E: Final = Driver(("e1000e", "af_packet"), _NETWORK)
IGB: Final = Driver(("igb", "af_packet"), _NETWORK)
VMXNET3: Final = Driver(("vmxnet3", "af_packet"), _NETWORK)
BALLOON: Final = Driver(("virtio_pci", "virtio_balloon"), "")
DRIVERS: Final = (
    *(VIRTIO_BLK, VIRTIO_SCSI, VIRTIOFS, NVME, AHCI, LSI, MEGASAS, PVSCSI),
    *(VIRTIO_NET, E1000, E1000E, IGB, VMXNET3),
)
_PLUGGED: Final = [each.memory_module for each in ARCHITECTURES.values() if each.memory_module]
ALL_MODULES: Final = sorted(
    {name for part in (*DRIVERS, BALLOON) for name in part.modules}
    | {name for part in _PLUGGED for name in part.linux_modules}
)

CONFIG_OPTIONS: Final[Mapping[str, str]] = {
    "af_packet": "CONFIG_PACKET",
    "ahci": "CONFIG_SATA_AHCI",
    "e1000": "CONFIG_E1000",
    "e1000e": "CONFIG_E1000E",
    "igb": "CONFIG_IGB",
    "megaraid_sas": "CONFIG_MEGARAID_SAS",
    "nvme": "CONFIG_BLK_DEV_NVME",
    "sd_mod": "CONFIG_BLK_DEV_SD",
    "sym53c8xx": "CONFIG_SCSI_SYM53C8XX_2",
    "virtio_balloon": "CONFIG_VIRTIO_BALLOON",
    "virtio_blk": "CONFIG_VIRTIO_BLK",
    "virtio_mem": "CONFIG_VIRTIO_MEM",
    "virtio_net": "CONFIG_VIRTIO_NET",
    "virtio_pci": "CONFIG_VIRTIO_PCI",
    "virtio_scsi": "CONFIG_SCSI_VIRTIO",
    "virtiofs": "CONFIG_VIRTIO_FS",
    "vmw_pvscsi": "CONFIG_VMWARE_PVSCSI",
    "vmxnet3": "CONFIG_VMXNET3",
}
"""The option of the kernel's configuration that builds each module (the kernel's Kconfig files)."""
