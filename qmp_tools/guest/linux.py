"""The Linux guest: the distribution's own kernel and an init of ours.

The kernel is unpacked to its ELF (QEMU enters that by PVH, which saves the decompressor's seconds
under TCG); the initramfs holds the modules that the disk needs and one static program,
``guests/linux/init.c`` with ``guests/workload.c``.
"""

from __future__ import annotations

import logging
import re
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..host import archive
from ..qemu.machine import MIB
from .build import Guest, cache, compile_c, digest, fresh_folder, sources
from .compression import decompress

_logger = logging.getLogger(__name__)

_KERNEL_PACKAGE: Final = "linux-image-amd64"
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check "
    "random.trust_cpu=on cryptomgr.notests transparent_hugepage=never "
    "memhp_default_state=online_movable"
)


@dataclass(frozen=True)
class Driver:
    """How Linux comes to a device: by `modules`, and what these depend on.

    `place` tells ``guests/linux/init.c`` where the device is: a disk's node, a file in a virtiofs
    of such a tag, or a network interface.
    """

    modules: Sequence[str]
    place: str

    @property
    def has_disk(self) -> bool:
        """Whether it is the node of a disk, for which our guests wait until it is plugged."""
        return "disk=/dev/" in self.place


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
_MODULES: Final = sorted({name for driver in (*DRIVERS, BALLOON) for name in driver.modules})

_MODULE_TREES: Final = ("lib/modules", "usr/lib/modules")
"""Where a kernel package has its modules: until Debian 12, and from Debian 13 on."""
_BUILT_IN: Final = "built_in"

_INIT_OPTIONS: Final = ("-static", "-pthread", "-std=c11")

MEMORY_BYTES: Final = 256 * MIB
"""The guest's RAM, where no other size is asked for."""

_KVM_TIMEOUT_S: Final = 6.0
"""Under TCG the first request comes after 2 s."""


def linux_guest(driver: Driver = VIRTIO_BLK) -> Guest:
    """The Linux guest with one of our `DRIVERS`; the first time its kernel is fetched and its init
    compiled.

    Raises:
        UntestableError: the kernel cannot be had, or there is no compiler.
    """
    kernel = _linux_kernel()
    version = (kernel / "version").read_text().strip()
    folder = sources()
    files = [*sorted((folder / "linux").glob("*.c")), folder / "workload.c"]
    headers = [*sorted((folder / "linux").glob("*.h")), folder / "workload.h"]
    parts = [file.read_bytes() for file in (*files, *headers)]
    how = f"{kernel.name} {version} {_INIT_OPTIONS} {driver.modules}"
    target = cache() / f"linux-{digest([how.encode(), *parts])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("building the guest's initramfs")
                compile_c(files, fresh / "init", *_INIT_OPTIONS)
                (fresh / "initramfs").write_bytes(
                    _initramfs((fresh / "init").read_bytes(), kernel / "modules", driver)
                )
    return Guest(
        name="linux",
        version=f"{version} {target.name}",
        kernel=kernel / "vmlinux",
        initramfs=target / "initramfs",
        options=f"{_COMMAND_LINE} -- {driver.place}",
        memory_bytes=MEMORY_BYTES,
        kvm_timeout_s=_KVM_TIMEOUT_S,
    )


def kernel_folder() -> Path:
    """Where the kernel is kept, once it has been fetched."""
    return cache() / f"kernel-{digest([' '.join((*_MODULES, _BUILT_IN)).encode()])}"


def _linux_kernel() -> Path:
    """A folder with ``vmlinux``, ``modules/`` and ``version``."""
    target = kernel_folder()
    if target.is_dir():
        return target
    with fresh_folder(target) as fresh:
        if fresh is not None:
            real = archive.dependencies(_KERNEL_PACKAGE)[0]
            _logger.info("fetching the guest's kernel (%s), once", real)
            unpacked = fresh / "unpacked"
            archive.unpack(archive.fetch_own(real, fresh), unpacked)
            image = next((unpacked / "boot").glob("vmlinuz-*"), None)
            if image is None:
                raise UntestableError(f"package {real} has no kernel: expected boot/vmlinuz-*")
            (fresh / "vmlinux").write_bytes(kernel_elf(image.read_bytes()))
            (fresh / "version").write_text(image.name.removeprefix("vmlinuz-"))
            pick_modules(unpacked, _MODULES, fresh / "modules")
            shutil.rmtree(unpacked)
            for package in fresh.glob("*.deb"):
                package.unlink()
    return target


def kernel_elf(image: bytes) -> bytes:
    """The ELF inside a bzImage (Linux x86 boot protocol 2.08: payload_offset, payload_length).

    Raises:
        UntestableError: this is no such image, or it cannot be decompressed.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise UntestableError("the kernel is no bzImage")
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length]
    return decompress(payload, "the kernel")


def pick_modules(unpacked: Path, wanted: Sequence[str], folder: Path) -> None:
    """Copy the modules that are `wanted`, and what they depend on, uncompressed into `folder`.

    The names of those that are built into the kernel go into its file ``built_in``.
    """
    folder.mkdir()
    trees = [unpacked / place for place in _MODULE_TREES]
    found = {_module(file.name): file for tree in trees for file in tree.rglob("*.ko*")}
    lists = [file for tree in trees for file in tree.rglob("modules.builtin")]
    built_in = {_module(Path(line).name) for file in lists for line in file.read_text().split()}
    (folder / _BUILT_IN).write_text("".join(f"{name}\n" for name in sorted(built_in)))
    left = list(wanted)
    while left:
        name = left.pop()
        target = folder / f"{name}.ko"
        if name not in found or target.exists():
            continue
        content = found[name].read_bytes()
        if found[name].suffix != ".ko":
            content = decompress(content, f"module {name}")
        target.write_bytes(content)
        left += _dependencies(content)


def _module(file_name: str) -> str:
    return file_name.partition(".")[0].replace("-", "_")


def _dependencies(module: bytes) -> list[str]:
    """The modules that an uncompressed one depends on, as its .modinfo section says."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match[1].decode().split(",") if match else []
    return [_module(name) for name in names if name]


def load_order(wanted: Sequence[str], modules: Path) -> list[str]:
    """The `wanted` modules and what they depend on, each after its dependencies.

    `modules` was filled by `pick_modules`. What is built in needs no loading.

    Raises:
        UntestableError: the kernel has a module neither as a file nor built in.
    """
    built_in = set((modules / _BUILT_IN).read_text().split())
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name in built_in:
            return
        file = modules / f"{name}.ko"
        if not file.exists():
            raise UntestableError(
                f"the kernel has no module {name}: it is not in its package "
                f"({' or '.join(_MODULE_TREES)}), and modules.builtin does not name it"
            )
        for dependency in _dependencies(file.read_bytes()):
            add(dependency)
        order.append(name)

    for name in wanted:
        add(name)
    return order


def _initramfs(init: bytes, modules: Path, driver: Driver) -> bytes:
    names = [f"modules/{name}.ko" for name in load_order(driver.modules, modules)]
    order = "".join(f"/{name}\n" for name in names)
    files = {name: (modules.parent / name).read_bytes() for name in names}
    return newc_archive({"init": init, "modules/order": order.encode(), **files})


def newc_archive(files: dict[str, bytes]) -> bytes:
    """A cpio archive in the 'newc' form (kernel documentation, initramfs buffer format).

    Folders are made for the `files`, all of which may be executed.
    """
    archive_bytes = bytearray()

    def add(name: str, mode: int, content: bytes = b"") -> None:
        encoded = name.encode() + b"\0"
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        archive_bytes.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        archive_bytes.extend(bytes(-len(archive_bytes) % 4))
        archive_bytes.extend(content)
        archive_bytes.extend(bytes(-len(archive_bytes) % 4))

    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    for folder in ("dev", "proc", *folders):
        add(folder, 0o040755)
    for name, content in files.items():
        add(name, 0o100755, content)
    add("TRAILER!!!", 0)
    return bytes(archive_bytes)
