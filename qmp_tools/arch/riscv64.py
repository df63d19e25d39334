"""RISC-V guests of 64 bits, in QEMU's virt machine with OpenSBI."""

from __future__ import annotations

from typing import Final

from .architecture import Architecture, KernelPackage

RISCV64: Final = Architecture(
    name="riscv64",
    debian="riscv64",
    gnu="riscv64-linux-gnu",
    qemu_packages={
        "debian": "qemu-system-misc",
        "fedora": "qemu-system-riscv-core",
        "arch": "qemu-system-riscv",
        "suse": "qemu-extra qemu-ipxe",
    },
    newer_qemu_package="qemu-system-riscv",
    firmware_packages=("opensbi",),
    cross_packages={
        "debian": "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross",
        "fedora": "gcc-riscv64-linux-gnu",
        "arch": "riscv64-linux-gnu-gcc",
    },
    machine="virt",
    # Debian's kernel (6.12) lacks CONFIG_HOTPLUG_PCI and CONFIG_VIRTIO_MEM, so nothing can be
    # plugged. It lacks CONFIG_RISCV_IOMMU, too.
    hotplug_machine=None,
    cpus={"kvm": "host"},
    kvm_remedy="use a processor with the hypervisor extension (H)",
    # OpenSBI prints to the machine's serial port, too.
    channels=("-serial", "chardev:console", "-device", "pci-serial,chardev=report"),
    report_tty="/dev/ttyS1",
    ram_start=2 << 30,
    kernels={4096: KernelPackage("linux-image-riscv64", "trixie")},
    linux_options="console=ttyS0",
    # After OpenSBI. It enters the guest at the lowest address that QEMU loads (riscv_load_kernel),
    # so the ELF's headers must not be loaded (--nmagic).
    probe_options=("-Wl,-Ttext=0x80200000,--nmagic",),
)
