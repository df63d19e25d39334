"""The virtual machine of a proof as QEMU arguments: the same for source and destination."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from .iommu import IOMMUS

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RAM_GRANULE_BYTES: Final = 8 * KIB
"""QEMU's PC machines take RAM in steps of this (MachineClass.fixup_ram_size, pc_memory_init)."""

RAM_BACKEND: Final = "ram"
"""The id of the memory backend that is the guest's RAM."""

_SUFFIXES: Final = {"": MIB, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}


def option_value(text: object) -> str:
    """`text`, such as a path, as the value of one of several options behind a QEMU option."""
    return str(text).replace(",", ",,")


def parse_memory(text: str) -> int:
    """The bytes that '512M', '524296K', '5G' or '512' (MiB, as with QEMU's -m) name.

    Raises:
        UsageError: it is no such size, or one that a PC machine cannot have.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper().removesuffix("IB"))
    if match is None:
        raise UsageError(f"memory {text!r}: a number with K, M or G is due, such as 512M")
    size = int(match[1]) * _SUFFIXES[match[2]]
    if size < 64 * MIB or size % RAM_GRANULE_BYTES:
        raise UsageError(f"memory {text!r}: at least 64M, in steps of 8K, is due")
    return size


def format_memory(size: int) -> str:
    """The shortest form that `parse_memory` reads back."""
    for suffix, unit in (("G", GIB), ("M", MIB)):
        if size % unit == 0:
            return f"{size // unit}{suffix}"
    return f"{size // KIB}K"


_TAKEN_PROPERTIES: Final = {
    **dict.fromkeys(
        ("append", "dtb", "firmware", "initrd", "kernel"), "dmaproof boots a guest of its own"
    ),
    "accel": "--accel chooses the accelerator",
    "memory": "--memory sizes the guest's RAM",
    "memory-backend": "--memory sizes the guest's RAM, which must be one shared memfd",
    "smp": "--cpus says how many CPUs the guest has",
}
"""Properties of machine types that `Machine` sets, by another option of QEMU or in the same."""


def refuse_taken_properties(machine: str) -> None:
    """Refuse a ``--machine`` such as 'q35,memory-backend=x', which dmaproof would override.

    Raises:
        UsageError: dmaproof itself sets one of the properties.
    """
    for pair in machine.split(",")[1:]:
        name = pair.partition("=")[0]
        if (why := _TAKEN_PROPERTIES.get(name.partition(".")[0])) is not None:
            raise UsageError(f"--machine {machine}: dmaproof sets {name} itself: {why}")


@dataclass(frozen=True)
class Machine:
    """A guest to be started twice: as the source and as the destination of a migration.

    `memory_bytes` of RAM stand in one shared memfd, which the device and the comparison map too. So
    many DIMMs as `dimm_slots` can be plugged, each of `DIMM_BYTES`. Its devices are behind the
    `iommu`, if there is one (`iommu.IOMMUS`).
    """

    machine: str
    accelerator: str
    memory_bytes: int
    cpus: int
    kernel: Path
    initramfs: Path | None = None
    command_line: str = ""
    dimm_slots: int = 0
    iommu: str | None = None

    def arguments(self) -> list[str]:
        """The QEMU arguments that both sides share."""
        # The firmware registers a pvclock page that KVM updates behind the migration's back.
        cpu = ["-cpu", "qemu64,-kvmclock"] if self.accelerator == "kvm" else []
        initrd = ["-initrd", str(self.initramfs)] if self.initramfs else []
        return [
            "-no-user-config",
            "-no-reboot",
            *("-accel", self.accelerator),
            *cpu,
            *("-smp", str(self.cpus)),
            *(
                "-object",
                f"memory-backend-memfd,id={RAM_BACKEND},size={self.memory_bytes},share=on",
            ),
            *("-machine", f"{self.machine},memory-backend={RAM_BACKEND}"),
            *("-m", f"{self.memory_bytes // KIB}K{self._room_for_dimms()}"),
            *("-kernel", str(self.kernel)),
            *initrd,
            *("-append", self.command_line),
            *(IOMMUS[self.iommu].qemu_arguments if self.iommu else ()),
        ]

    def _room_for_dimms(self) -> str:
        if not self.dimm_slots:
            return ""
        most_bytes = self.memory_bytes + self.dimm_slots * DIMM_BYTES
        return f",slots={self.dimm_slots},maxmem={most_bytes // KIB}K"


DIMM_BYTES: Final = 128 * MIB
"""A memory block of Linux on x86: what is smaller it does not take."""


def dimm_arguments(name: str, address: int | None = None) -> list[str]:
    """The QEMU arguments of the DIMM `name`, at a guest-physical address or where QEMU likes."""
    place = "" if address is None else f",addr={address:#x}"
    return [
        *("-object", f"memory-backend-memfd,id={name}-ram,size={DIMM_BYTES},share=on"),
        *("-device", f"pc-dimm,id={name},memdev={name}-ram{place}"),
    ]


def vhost_user_blk_arguments(socket: Path, queues: int) -> list[str]:
    """The QEMU arguments that attach a vhost-user-blk device whose back end listens at `socket`."""
    return [
        *("-chardev", f"socket,id=disk,path={option_value(socket)}"),
        *("-device", f"vhost-user-blk-pci,chardev=disk,num-queues={queues},queue-size=128"),
    ]


def vhost_user_fs_arguments(socket: Path) -> list[str]:
    """The QEMU arguments that attach a vhost-user-fs device of tag 'disk'."""
    return [
        *("-chardev", f"socket,id=disk,path={option_value(socket)}"),
        *("-device", "vhost-user-fs-pci,chardev=disk,tag=disk"),
    ]


def vhost_user_net_arguments(socket: Path) -> list[str]:
    """The QEMU arguments that attach a network card whose back end listens at `socket`."""
    return [
        *("-chardev", f"socket,id=net,path={option_value(socket)}"),
        *("-netdev", "vhost-user,id=net,chardev=net"),
        *("-device", "virtio-net-pci,netdev=net"),
    ]


SOURCE: Final = "source"
DESTINATION: Final = "destination"
"""What the two sides of a proof are called."""

INCOMING: Final = ("-S", "-incoming", "defer")
"""What makes a QEMU a destination: it waits for migrate-incoming, and stays paused afterwards."""
