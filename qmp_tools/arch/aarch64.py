"""arm64 guests, in QEMU's virt machine without firmware."""

from __future__ import annotations

from typing import Final

from .architecture import Architecture, Iommu, KernelBuild, KernelPackage, MemoryModule

# QEMU puts the device tree at the start of RAM if an ELF leaves room there, and nowhere if not
# (arm_setup_direct_kernel_boot in hw/arm/boot.c). The tree has at most 1 MiB (FDT_MAX_SIZE).
_ABOVE_DEVICE_TREE: Final = "-Wl,-Ttext-segment=0x40200000"

AARCH64: Final = Architecture(
    name="aarch64",
    debian="arm64",
    gnu="aarch64-linux-gnu",
    # Without the ROM of ipxe, network devices do not start.
    qemu_packages={
        "debian": "qemu-system-arm ipxe-qemu",
        "fedora": "qemu-system-aarch64-core",
        "arch": "qemu-system-aarch64",
        "suse": "qemu-arm qemu-ipxe",
    },
    cross_packages={
        "debian": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        "fedora": "gcc-aarch64-linux-gnu",
        "arch": "aarch64-linux-gnu-gcc",
    },
    machine="virt",
    hotplug_machine="virt",
    hotplug_needs_port=True,
    # Without UEFI firmware, QEMU refuses a DIMM ('memory hotplug is not enabled: missing acpi-ged
    # device', virt_memory_pre_plug), and Debian's kernels lack CONFIG_ACPI_HOTPLUG_MEMORY.
    memory_module=MemoryModule(
        device="virtio-mem-pci",
        address="memaddr",
        guests=("bare", "linux"),
        properties=f",requested-size={128 << 20}",
        needs_port=True,
        linux_modules=("virtio_pci", "virtio_mem"),
    ),
    # The default CPU is a 32-bit one. This one has pages of 4K, 16K and 64K, and no pointer
    # authentication, which TCG emulates slowly.
    cpus={"kvm": "host", "tcg": "neoverse-n1"},
    # Kernels have KVM built in. It needs EL2 (kernel, arch/arm64/kvm/arm.c: kvm_arm_init).
    kvm_remedy="use hardware, or a hypervisor that starts the kernel at EL2 (nesting)",
    # The machine has one serial port. The kernel's own driver (8250_PCI) drives the other.
    channels=("-serial", "chardev:report", "-device", "pci-serial,chardev=console"),
    report_tty="/dev/ttyAMA0",
    ram_start=1 << 30,
    kernels={
        4096: KernelPackage("linux-image-arm64"),
        16384: KernelPackage("linux-image-arm64-16k", "trixie"),
    },
    kernel_builds={
        65536: KernelBuild("kernel-64k.config", "arm64", "Image", "arch/arm64/boot/Image"),
    },
    linux_options="console=ttyS0",
    freestanding_options=(
        "-mgeneral-regs-only",  # accesses to the FPU's registers trap
        "-mno-outline-atomics",  # the functions for them are in a library
        _ABOVE_DEVICE_TREE,
    ),
    probe_options=(_ABOVE_DEVICE_TREE,),
    iommus={
        "smmuv3": Iommu(
            summary="SMMUv3; the guest removes each mapping as soon as its request is done",
            machine="virt",
            machine_options=",iommu=smmuv3",
            linux_options="iommu.passthrough=0 iommu.strict=1",
            guests=("bare", "linux"),
        ),
        "smmuv3-lazy": Iommu(
            summary="SMMUv3; the guest removes mappings in batches, those of the rings included",
            machine="virt",
            machine_options=",iommu=smmuv3",
            linux_options="iommu.passthrough=0 iommu.strict=0",
            guests=("linux",),
        ),
    },
)
