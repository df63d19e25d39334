"""x86-64 guests, in QEMU's PCs."""

from __future__ import annotations

from typing import Final

from .architecture import Architecture, Iommu, KernelPackage, MemoryModule

_VT_D: Final = ("-device", "intel-iommu,device-iotlb=on,intremap=off")

X86_64: Final = Architecture(
    name="x86_64",
    debian="amd64",
    gnu="x86_64-linux-gnu",
    qemu_packages={
        "debian": "qemu-system-x86",
        "fedora": "qemu-system-x86-core",
        "arch": "qemu-system-x86",
        "suse": "qemu-x86",
    },
    cross_packages={
        "debian": "gcc-x86-64-linux-gnu libc6-dev-amd64-cross",
        "fedora": "gcc-x86_64-linux-gnu",
    },
    firmware_packages=("seabios",),
    machine="q35",
    # A q35 accepts hot-plugged devices only behind a port, and assigns them no address there.
    hotplug_machine="pc",
    memory_module=MemoryModule(device="pc-dimm", address="addr", guests=("bare", "linux")),
    # The firmware registers a pvclock page, which KVM updates without marking it dirty.
    cpus={"kvm": "qemu64,-kvmclock"},
    kvm_modules={"vmx": "kvm_intel", "svm": "kvm_amd"},
    kvm_remedy="enable virtualization in the firmware, or nesting in the hypervisor",
    channels=("-serial", "chardev:console", "-serial", "chardev:report"),
    report_tty="/dev/ttyS1",
    low_ram_property="max-ram-below-4g",
    kernels={4096: KernelPackage("linux-image-amd64")},
    linux_options="console=ttyS0 tsc=reliable no_timer_check",
    freestanding_options=(
        "-fcf-protection=none",
        "-mgeneral-regs-only",  # the FPU is not set up
        "-mno-red-zone",  # an exception uses the stack at once
        "-Wl,-Ttext-segment=0x100000",  # above the firmware's memory
    ),
    probe_options=("-m32", "-Wl,-Ttext-segment=0x100000"),
    iommus={
        "intel": Iommu(
            summary="VT-d; the guest removes each mapping as soon as its request is done",
            machine="q35",
            qemu_arguments=_VT_D,
            linux_options="intel_iommu=on iommu.strict=1",
            guests=("bare", "linux"),
        ),
        "intel-lazy": Iommu(
            summary="VT-d; the guest removes mappings in batches, those of the rings included",
            machine="q35",
            qemu_arguments=_VT_D,
            linux_options="intel_iommu=on iommu.strict=0",
            guests=("linux",),
        ),
    },
)
