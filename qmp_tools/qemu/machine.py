"""Describe the virtual machine of a proof as QEMU arguments, equal for source and destination."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UsageError

from ..arch.architecture import Architecture
from .memory_backend import MEMFD, MemoryBackend
from .pci_express import root_port

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
RAM_BACKEND: Final = "ram"
"""The id of the memory backend that is the guest's RAM."""

RESIZABLE: Final = "resizable"
"""The id of the virtio-mem device of a machine with `resizable_bytes`."""

NVDIMM: Final = "nvdimm"
"""The id of the NVDIMM of a machine with `nvdimm_bytes`."""

NVDIMM_START: Final = 4 * GIB
"""Where an NVDIMM is. Memory can be plugged here if all RAM is below (pc_memory_init)."""

_LOG_WORD_BYTES: Final = 256 * KIB
"""The RAM that one word of QEMU's vhost log covers."""

_SUFFIXES: Final = {"": MIB, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}


def option_value(text: object) -> str:
    """Escape `text`, such as a path, as a value in a comma-separated list of QEMU options."""
    return str(text).replace(",", ",,")


def parse_memory(text: str) -> int:
    """Parse a size such as '512M', '524296K', '5G' or '512' (MiB, as with QEMU's -m).

    Returns:
        The size in bytes.

    Raises:
        UsageError: `text` is not a size, or a machine cannot have RAM of this size.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper().removesuffix("IB"))
    if match is None:
        raise UsageError(f"memory: expected a number with K, M or G, such as 512M, got {text!r}")
    size = int(match[1]) * _SUFFIXES[match[2]]
    granule = ram_granule_bytes()
    if size < 64 * MIB or size % granule:
        raise UsageError(
            f"memory: expected at least 64M and a multiple of {format_memory(granule)}, "
            f"got {text!r}"
        )
    return size


def ram_granule_bytes(machine_bytes: int = Architecture.ram_granule_bytes) -> int:
    """Return what the size of RAM must be a multiple of on this host.

    Args:
        machine_bytes: what it must be a multiple of in the machine.

    QEMU 8.2 and newer refuse a memory backend that is not whole pages of the host
    (host_memory_backend_memory_complete).
    """
    return max(machine_bytes, mmap.PAGESIZE)


def format_memory(size: int) -> str:
    """Return the shortest text that `parse_memory` parses to `size` bytes."""
    for suffix, unit in (("G", GIB), ("M", MIB)):
        if size % unit == 0:
            return f"{size // unit}{suffix}"
    return f"{size // KIB}K"


_TAKEN_PROPERTIES: Final = {
    **dict.fromkeys(
        ("append", "dtb", "firmware", "initrd", "kernel"), "dmaproof boots its own guest"
    ),
    "accel": "use --accel to choose the accelerator",
    "memory": "use --memory to set the size of the guest's RAM",
    "memory-backend": "use --memory and --memory-backend to set the guest's RAM",
    "smp": "use --cpus to set the number of the guest's CPUs",
}
"""Properties of machine types that `Machine` sets, with -machine or another option of QEMU."""


def refuse_taken_properties(machine: str) -> None:
    """Refuse a ``--machine`` such as 'q35,memory-backend=x', which dmaproof would override.

    Raises:
        UsageError: dmaproof itself sets one of the properties.
    """
    for pair in machine.split(",")[1:]:
        name = pair.partition("=")[0]
        if (why := _TAKEN_PROPERTIES.get(name.partition(".")[0])) is not None:
            raise UsageError(f"--machine {machine}: dmaproof itself sets {name}; {why}")


@dataclass(frozen=True)
class Hardware:
    """What a scenario adds to a machine.

    `machine_options` are further options of any machine type (",option=value"), `kvm_options` those
    of KVM, and `qemu_arguments` further arguments of both QEMUs. `dimms` DIMMs of `DIMM_BYTES` each
    can be plugged. A virtio-mem device has up to `resizable_bytes`, none of which are plugged at
    the start. An NVDIMM has `nvdimm_bytes`.
    """

    machine_options: str = ""
    kvm_options: str = ""
    qemu_arguments: tuple[str, ...] = ()
    dimms: int = 0
    resizable_bytes: int = 0
    nvdimm_bytes: int = 0

    @property
    def memory_device_bytes(self) -> Mapping[str, int]:
        """The bytes of each memory device, once all of it is plugged, by the device's name."""
        dimms = {dimm_name(number): DIMM_BYTES for number in range(self.dimms)}
        others = {RESIZABLE: self.resizable_bytes, NVDIMM: self.nvdimm_bytes}
        return dimms | {name: size for name, size in others.items() if size}


@dataclass(frozen=True)
class Machine:
    """A guest to start twice: as the source and as the destination of a migration.

    Its `memory_bytes` of RAM are in shared memory, a `backend` that the device maps too. With
    `numa_nodes`, each node has a part of the RAM in a backend of its own, and the parts have equal
    sizes except for the first and the last one. The devices are behind the `iommu`, if one is named
    (`Architecture.iommus`). `added` is what the scenario adds.
    """

    architecture: Architecture
    machine: str
    accelerator: str
    memory_bytes: int
    cpus: int
    kernel: Path
    initramfs: Path | None = None
    command_line: str = ""
    iommu: str | None = None
    backend: MemoryBackend = MEMFD
    numa_nodes: int = 0
    added: Hardware = Hardware()

    @property
    def ram_backends(self) -> dict[str, int]:
        """The bytes of each memory backend of the guest's RAM, by the backend's id."""
        if not self.numa_nodes:
            return {RAM_BACKEND: self.memory_bytes}
        # QEMU loses bits of its vhost log if a node begins inside a word of the log
        # (vhost_dev_sync_region; see docs/qemu-findings.md).
        unit_bytes = max(_LOG_WORD_BYTES, self.backend.page_bytes)
        units, rest_bytes = divmod(self.memory_bytes, unit_bytes)
        node_bytes = units // self.numa_nodes * unit_bytes
        names = [f"{RAM_BACKEND}{node}" for node in range(self.numa_nodes)]
        sizes = dict.fromkeys(names, node_bytes)
        # Under TCG, QEMU aborts if the first block is smaller than another one that it syncs by
        # whole words (tlb_reset_dirty_range_all; see docs/qemu-findings.md).
        sizes[names[0]] += units % self.numa_nodes * unit_bytes
        sizes[names[-1]] += rest_bytes
        return sizes

    @property
    def larger_than_first(self) -> Mapping[str, int]:
        """The bytes of the blocks that are larger than the first, and whole words of bitmaps."""
        blocks = {**self.ram_backends, **self.added.memory_device_bytes}
        first_bytes = next(iter(blocks.values()))
        return {
            name: size
            for name, size in blocks.items()
            if size > first_bytes and size % _LOG_WORD_BYTES == 0
        }

    @property
    def most_memory_bytes(self) -> int:
        """The RAM of one side with everything plugged."""
        return self.memory_bytes + sum(self.added.memory_device_bytes.values())

    def arguments(self) -> list[str]:
        """Return the QEMU arguments that both sides share."""
        cpu = self.architecture.cpus.get(self.accelerator)
        accelerator_options = self.added.kvm_options if self.accelerator == "kvm" else ""
        initrd = ["-initrd", str(self.initramfs)] if self.initramfs else []
        return [
            "-no-user-config",
            "-no-reboot",
            *self.architecture.channels,
            *("-accel", f"{self.accelerator}{accelerator_options}"),
            *(("-cpu", cpu) if cpu else ()),
            *("-smp", str(self.cpus)),
            *self._ram_arguments(),
            *("-m", f"{self.memory_bytes // KIB}K{self._dimm_slot_options()}"),
            *("-kernel", str(self.kernel)),
            *initrd,
            *("-append", self.command_line),
            *self._dimm_ports(),
            *self._resizable_arguments(),
            *self._nvdimm_arguments(),
            *(self.architecture.iommus[self.iommu].qemu_arguments if self.iommu else ()),
            *self.added.qemu_arguments,
        ]

    def dimm_arguments(self, number: int, address: int | None = None) -> list[str]:
        """Return the QEMU arguments of DIMM `number`; without `address`, QEMU chooses one.

        The DIMM is of the architecture's kind (`MemoryModule`).
        """
        module = self.architecture.memory_module
        assert module is not None
        name = dimm_name(number)
        place = "" if address is None else f",{module.address}={address:#x}"
        bus = f",bus={name}-port" if module.needs_port else ""
        return [
            *("-object", self.backend.object(f"{name}-ram", DIMM_BYTES)),
            *(
                "-device",
                f"{module.device},id={name},memdev={name}-ram{module.properties}{bus}{place}",
            ),
        ]

    def _ram_arguments(self) -> list[str]:
        backends = self.ram_backends
        objects = [
            word
            for name, size in backends.items()
            for word in ("-object", self.backend.object(name, size))
        ]
        machine = self.machine + self.added.machine_options
        if not self.numa_nodes:
            return [*objects, "-machine", f"{machine},memory-backend={RAM_BACKEND}"]
        nodes = [word for name in backends for word in ("-numa", f"node,memdev={name}")]
        return [*objects, "-machine", machine, *nodes]

    def _dimm_ports(self) -> list[str]:
        module = self.architecture.memory_module
        if module is None or not module.needs_port:
            return []
        names = [f"{dimm_name(number)}-port" for number in range(self.added.dimms)]
        return [
            word
            for number, name in enumerate(names, _FIRST_DIMM_CHASSIS)
            for word in root_port(name, number)
        ]

    def _resizable_arguments(self) -> list[str]:
        if not self.added.resizable_bytes:
            return []
        backend = f"{RESIZABLE}-ram"
        return [
            *("-object", self.backend.object(backend, self.added.resizable_bytes)),
            *("-device", f"virtio-mem-pci,id={RESIZABLE},memdev={backend},requested-size=0"),
        ]

    def _nvdimm_arguments(self) -> list[str]:
        if not self.added.nvdimm_bytes:
            return []
        backend = f"{NVDIMM}-ram"
        return [
            *("-object", self.backend.object(backend, self.added.nvdimm_bytes)),
            *("-device", f"nvdimm,id={NVDIMM},memdev={backend},addr={NVDIMM_START}"),
        ]

    def _dimm_slot_options(self) -> str:
        if self.most_memory_bytes == self.memory_bytes:
            return ""
        count = self.added.dimms + bool(self.added.nvdimm_bytes)
        slots = f",slots={count}" if count else ""
        return f"{slots},maxmem={self.most_memory_bytes // KIB}K"


DIMM_BYTES: Final = 128 * MIB
"""The size of a memory block of Linux, which ignores smaller DIMMs."""

_FIRST_DIMM_CHASSIS: Final = 200
"""Ports of devices have lower numbers (`pci_express`)."""


def address_of(device: Mapping[str, Any]) -> int:
    """Return the guest-physical address of a memory device's data in query-memory-devices.

    A DIMM has 'addr', persistent and paravirtual memory 'memaddr' (MemoryDeviceInfo).
    """
    return int(device.get("addr", device.get("memaddr", 0)))


def dimm_name(number: int) -> str:
    """Return the id of the plugged DIMM `number`, from 0 on."""
    return f"dimm{number}"


SOURCE: Final = "source"
DESTINATION: Final = "destination"
"""The names of the two sides of a proof."""

INCOMING: Final = ("-S", "-incoming", "defer")
"""The arguments of a destination: it waits for migrate-incoming, and stays paused afterwards."""
