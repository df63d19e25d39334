"""What differs between the architectures of guests: one frozen record for each."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from dmaproof.errors import UnsupportedError

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Iommu:
    """A virtual IOMMU of QEMU.

    `machine` is part of the name of the machine types that have it. `machine_options` are added to
    the machine type (",option=value"), and `qemu_arguments` precede those of the devices.
    `linux_options` are for the command line of the Linux guest, and `guests` names the guests that
    support the IOMMU.
    """

    summary: str
    machine: str
    machine_options: str = ""
    qemu_arguments: Sequence[str] = ()
    linux_options: str
    guests: Sequence[str]


@dataclass(frozen=True)
class KernelPackage:
    """Debian's package of a kernel, and the oldest release that has it (None: every release)."""

    name: str
    oldest_release: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryModule:
    """Memory that can be plugged into the running machine, and the guests that use it.

    `device` is QEMU's device, whose property `address` is the guest-physical address. `properties`
    are further ones (",name=value"). `needs_port` says whether the device needs a PCI Express port
    of its own, and `linux_modules` names its driver's modules.
    """

    device: str
    address: str
    guests: Sequence[str]
    properties: str = ""
    needs_port: bool = False
    linux_modules: Sequence[str] = ()


@dataclass(frozen=True)
class KernelBuild:
    """A kernel that no distribution packages, so that dmaproof builds it.

    - `config`: a file of options in ``guests/linux``, on top of allnoconfig.
    - `kbuild`: the kernel's own name of the architecture (make's ARCH).
    - `goals`: what make builds; `image`: the built file that QEMU boots.
    """

    config: str
    kbuild: str
    goals: str
    image: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of guests, and how QEMU emulates it.

    - `name`: as in ``uname -m``, in QEMU's query-target and in the name of QEMU's program.
    - `debian`: the name in Debian's packages; `gnu`: the prefix of the cross compiler's programs.
    - `qemu_packages`: the packages of QEMU by family of distributions ('debian', 'fedora', 'arch',
      'suse'); `firmware_packages`: Debian's packages that QEMU starts with besides.
      `newer_qemu_package`: the only package of QEMU that Debian needs from release 13 on; None if
      it is still the same.
    - `cross_packages`: the packages, by family, of a compiler that builds the guest on a machine of
      another architecture, with a static C library.
    - `machine`: the default machine type. `hotplug_machine` is that of proofs that plug a disk into
      the running guest; None if the guest takes no new disk.
    - `hotplug_needs_port`: whether that disk needs a PCI Express port of its own.
    - `memory_module`: how memory can be plugged into the machine; None if it cannot.
    - `cpus`: the values of ``-cpu``, by accelerator; QEMU's default for an accelerator without one.
    - `kvm_modules`: the kernel's module of KVM, by the word of /proc/cpuinfo that says that the
      processor supports it; `kvm_remedy`: advice for a machine with neither KVM nor such a word.
    - `channels`: QEMU's arguments that connect the character devices ``console`` and ``report`` to
      the guest; `report_tty`: the file of the report channel in the Linux guest.
    - `ram_start`: the address of the guest's RAM in bytes.
    - `low_ram_property`: the property of the machine type that limits the RAM below 4 GiB; None if
      the RAM is in one piece.
    - `virtio_bus`: the bus of QEMU's virtio devices, at the end of their names: 'pci' or 'ccw'.
    - `devices`: dmaproof's devices that QEMU has and migrates there; empty for all.
    - `has_numa`: whether its machines have NUMA nodes.
    - `ram_granule_bytes`: the size of RAM is a multiple of this (MachineClass.fixup_ram_size).
    - `kernels`: Debian's packages of the Linux guest's kernel, by the size of its pages in bytes.
      `kernel_builds`: those that dmaproof builds.
    - `linux_options`: for the command line of the Linux guest.
    - `freestanding_options`: the options of the C compiler for the bare guest; None if there is no
      bare guest for the architecture. `probe_options` are those for the probe.
    - `iommus`: by the value of ``--iommu``, the default first.
    """

    name: str
    debian: str
    gnu: str
    qemu_packages: Mapping[str, str]
    newer_qemu_package: str | None = None
    cross_packages: Mapping[str, str]
    firmware_packages: Sequence[str] = ()
    machine: str
    hotplug_machine: str | None
    hotplug_needs_port: bool = False
    memory_module: MemoryModule | None = None
    cpus: Mapping[str, str]
    kvm_modules: Mapping[str, str] = field(default_factory=dict)
    kvm_remedy: str
    channels: Sequence[str]
    report_tty: str
    ram_start: int = 0
    low_ram_property: str | None = None
    virtio_bus: str = "pci"
    devices: Sequence[str] = ()
    has_numa: bool = True
    ram_granule_bytes: int = 8 * _KIB
    kernels: Mapping[int, KernelPackage]
    kernel_builds: Mapping[int, KernelBuild] = field(default_factory=dict)
    linux_options: str
    freestanding_options: Sequence[str] | None = None
    probe_options: Sequence[str]
    iommus: Mapping[str, Iommu] = field(default_factory=dict)

    @property
    def is_host(self) -> bool:
        """Whether this machine has the architecture."""
        return self.name == platform.machine()

    @property
    def cross_compiler(self) -> str:
        """The name of the C compiler for this architecture on a machine of another one."""
        return f"{self.gnu}-gcc"

    @property
    def compiler(self) -> str:
        """The name of the C compiler for this architecture on this machine."""
        return "cc" if self.is_host else self.cross_compiler

    @property
    def qemu_program(self) -> str:
        """The name of QEMU's program for this architecture."""
        return f"qemu-system-{self.name}"

    @property
    def guests(self) -> list[str]:
        """The names of dmaproof's guests for this architecture."""
        return ["linux"] if self.freestanding_options is None else ["bare", "linux"]

    def require_guest(self, name: str) -> None:
        """Raise UnsupportedError if dmaproof has no guest `name` for this architecture."""
        if name not in self.guests:
            raise UnsupportedError(
                f"--guest {name}: this guest does not exist for {self.name}; use --guest "
                f"{' or '.join(self.guests)}"
            )

    def require_device(self, name: str) -> None:
        """Raise UnsupportedError if the machine cannot have dmaproof's device `name`."""
        if self.devices and name not in self.devices:
            raise UnsupportedError(
                f"--device {name}: QEMU does not have or does not migrate this device on "
                f"{self.name}; use --device {' or '.join(self.devices)}"
            )

    @property
    def fetch_options(self) -> str:
        """What follows ``dmaproof qemu fetch VERSION`` on this machine."""
        return "" if self.is_host else f" --arch {self.name}"

    @property
    def default_iommu(self) -> str | None:
        """The name of the IOMMU for a fault that needs one; None if the architecture has none."""
        return next(iter(self.iommus), None)

    def with_high_ram(self, memory_bytes: int) -> tuple[str, int]:
        """Return how a guest gets RAM above 4 GiB.

        Args:
            memory_bytes: the size of the guest's RAM without such RAM.

        Returns:
            Options of the machine type (",option=value"), and the size of the guest's RAM in bytes.
        """
        if self.low_ram_property is not None:
            return f",{self.low_ram_property}={memory_bytes // 2 // _MIB}M", memory_bytes
        below_bytes = 4 * _GIB - self.ram_start
        return "", memory_bytes if memory_bytes > below_bytes else below_bytes + memory_bytes
