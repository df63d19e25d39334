"""s390x (IBM Z) guests, whose devices are on the channel subsystem (CCW)."""

from __future__ import annotations

from typing import Final

from .architecture import Architecture, KernelPackage

S390X: Final = Architecture(
    name="s390x",
    debian="s390x",
    gnu="s390x-linux-gnu",
    qemu_packages={
        "debian": "qemu-system-misc",
        "fedora": "qemu-system-s390x-core",
        "arch": "qemu-system-s390x",
        "suse": "qemu-s390x",
    },
    newer_qemu_package="qemu-system-s390x",
    cross_packages={
        "debian": "gcc-s390x-linux-gnu libc6-dev-s390x-cross",
        "fedora": "gcc-s390x-linux-gnu",
    },
    machine="s390-ccw-virtio",
    # The guest's network cards can be plugged, but it has no disk outside QEMU.
    hotplug_machine=None,
    cpus={},
    kvm_remedy="KVM needs a logical partition (LPAR), or a hypervisor with nested virtualization",
    # QEMU refuses to migrate PCI devices ("State blocked by non-migratable device 'zpci'").
    virtio_bus="ccw",
    # vhost-user-blk and others are not on this bus ("not a valid device model name").
    devices=("echo",),
    # The line-mode console transfers whole lines only, so the other one carries the reports.
    channels=("-device", "sclplmconsole,chardev=console", "-device", "sclpconsole,chardev=report"),
    report_tty="/dev/ttysclp0",
    # QEMU: "ram size must be multiples of 1 MiB".
    has_numa=False,
    ram_granule_bytes=1 << 20,
    kernels={4096: KernelPackage("linux-image-s390x")},
    # Linux prints its messages to both consoles, whatever console= or conmode= says
    # (sclp_vt220_con_init). With this level it prints only that it panics.
    linux_options="loglevel=1",
    probe_options=("-march=z10", "-Wl,-Ttext-segment=0x100000"),
)
