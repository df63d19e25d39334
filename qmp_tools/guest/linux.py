"""Build the Linux guest from the distribution's kernel and dmaproof's init.

The kernel is unpacked to its ELF, which QEMU enters by PVH. That saves the seconds that the
kernel's decompressor takes under TCG. The initramfs holds the modules that the device needs and one
static program, ``guests/linux/init.c`` with ``guests/workload.c``.
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
from dmaproof.units import PAGE_BYTES

from ..arch import ARCHITECTURES
from ..arch.architecture import Architecture
from ..host import archive
from ..qemu.machine import MIB
from .build import Guest, cache, compile_c, digest, fresh_folder, sources
from .compression import decompress

_logger = logging.getLogger(__name__)

_COMMAND_LINE: Final = (
    "quiet panic=-1 nokaslr mitigations=off "
    "random.trust_cpu=on cryptomgr.notests transparent_hugepage=never "
    "memhp_default_state=online_movable"
)


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
_MODULES: Final = sorted(
    {
        *(name for driver in (*DRIVERS, BALLOON) for name in driver.modules),
        *(name for module in _PLUGGED for name in module.linux_modules),
    }
)

_MODULE_TREES: Final = ("lib/modules", "usr/lib/modules")
"""The folder of a kernel package's modules: until Debian 12, and from Debian 13 on."""
_BUILT_IN: Final = "built_in"

_INIT_OPTIONS: Final = ("-static", "-pthread", "-std=c11")

MEMORY_BYTES: Final = 256 * MIB
"""The default size of the guest's RAM."""

_KVM_TIMEOUT_S: Final = 6.0
"""Under TCG the guest sends its first request after 2 s."""


def linux_guest(driver: Driver, architecture: Architecture) -> Guest:
    """Return the Linux guest of `architecture` with one of the `DRIVERS`.

    The first call fetches the kernel and compiles the init.

    Raises:
        UntestableError: the kernel cannot be fetched, or no C compiler is installed.
    """
    kernel = _linux_kernel(architecture)
    version = (kernel / "version").read_text().strip()
    folder = sources()
    files = [*sorted((folder / "linux").glob("*.c")), folder / "workload.c"]
    headers = [*sorted((folder / "linux").glob("*.h")), folder / "workload.h"]
    parts = [file.read_bytes() for file in (*files, *headers)]
    how = f"{kernel.name} {version} {_INIT_OPTIONS} {driver.modules}"
    target = cache() / f"linux-{architecture.name}-{digest([how.encode(), *parts])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("building the guest's initramfs")
                compile_c(files, fresh / "init", *_INIT_OPTIONS, architecture=architecture)
                (fresh / "initramfs").write_bytes(
                    _initramfs((fresh / "init").read_bytes(), kernel / "modules", driver)
                )
    return Guest(
        name="linux",
        version=f"{version} {target.name}",
        architecture=architecture,
        kernel=kernel / "image",
        initramfs=target / "initramfs",
        options=(
            f"{architecture.linux_options} {_COMMAND_LINE} -- report={architecture.report_tty} "
            f"{driver.place}"
        ),
        memory_bytes=MEMORY_BYTES,
        kvm_timeout_s=_KVM_TIMEOUT_S,
    )


def kernel_folder(architecture: Architecture) -> Path:
    """Return the folder of the fetched kernel, which may not exist yet."""
    names = digest([" ".join((*_MODULES, _BUILT_IN)).encode()])
    return cache() / f"kernel-{architecture.name}-{names}"


def _linux_kernel(architecture: Architecture) -> Path:
    """Return a folder with ``image``, ``modules/`` and ``version``."""
    target = kernel_folder(architecture)
    if target.is_dir():
        return target
    with fresh_folder(target) as fresh:
        if fresh is not None:
            package = architecture.kernels[PAGE_BYTES].name
            release = archive.Archive(archive.own_codename(), fresh / "apt", architecture.debian)
            real = release.dependencies(package)[0]
            _logger.info("fetching the guest's kernel (%s), once", real)
            unpacked = fresh / "unpacked"
            archive.unpack(release.fetch(real), unpacked)
            image = next((unpacked / "boot").glob("vmlinuz-*"), None)
            if image is None:
                raise UntestableError(
                    f"package {real} has no kernel: boot/vmlinuz-* is missing from the package"
                )
            content = image.read_bytes()
            (fresh / "image").write_bytes(
                kernel_elf(content) if architecture.boots_elf else content
            )
            (fresh / "version").write_text(image.name.removeprefix("vmlinuz-"))
            pick_modules(unpacked, _MODULES, fresh / "modules")
            shutil.rmtree(unpacked)
            shutil.rmtree(fresh / "apt")
    return target


def kernel_elf(image: bytes) -> bytes:
    """Return the ELF in a bzImage (Linux x86 boot protocol 2.08: payload_offset, payload_length).

    Raises:
        UntestableError: `image` is not a bzImage, or cannot be decompressed.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise UntestableError("the kernel is not a bzImage: the signature 'HdrS' is missing")
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length]
    return decompress(payload, "the kernel")


def pick_modules(unpacked: Path, wanted: Sequence[str], folder: Path) -> None:
    """Copy the `wanted` modules and their dependencies, uncompressed, into `folder`.

    Write the names of the modules that are built into the kernel to the file ``built_in`` there.
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
    """Return the dependencies of an uncompressed module, from its .modinfo section."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match[1].decode().split(",") if match else []
    return [_module(name) for name in names if name]


def load_order(wanted: Sequence[str], modules: Path) -> list[str]:
    """Return the `wanted` modules and their dependencies, each after its dependencies.

    `modules` is a folder filled by `pick_modules`. Modules that are built in are left out.

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
                f"the kernel has no module {name}: the kernel's package has neither a file for it "
                f"in {' or '.join(_MODULE_TREES)} nor a line in modules.builtin"
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
    """Make a cpio archive in the 'newc' format (kernel documentation, initramfs buffer format).

    The archive has the folders of `files`, and all files are executable.
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
