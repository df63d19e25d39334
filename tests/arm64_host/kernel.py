"""The kernels of the emulated arm64 machine, one for each size of its pages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError
from qmp_tools.arch import find_architecture
from qmp_tools.arch.architecture import KernelBuild
from qmp_tools.guest import kernel as guest_kernel
from qmp_tools.guest.initramfs import newc_archive
from qmp_tools.guest.kernel import kernel_of_file
from qmp_tools.guest.kernel_build import built_kernel
from qmp_tools.host.archive import Archive, unpack
from qmp_tools.host.cached_folder import digest, fresh_folder, prune
from support.debian_tree import kept_folder

from .system import ARCHITECTURE, SUITE

_ARM64: Final = find_architecture("aarch64")
# ext4 asks for its checksum by name (ext4_fill_super), and the initramfs has no modprobe.
_MODULES: Final = ("virtio_blk", "crc32c_generic", "ext4")
_FOLDER: Final = Path(__file__).parent
_INIT: Final = _FOLDER / "initramfs.sh"
_BUSYBOX: Final = "busybox-static"
_BUILD: Final = KernelBuild(
    str(_FOLDER / "arm64_host_64k.config"), "arm64", "Image", "arch/arm64/boot/Image"
)


@dataclass(frozen=True)
class Kernel:
    """A kernel that mounts the first disk as its root file system."""

    image: Path
    initramfs: Path


def kernel_of(pages: str) -> Kernel:
    """Return the kernel with `pages` of '4K', '16K' or '64K'; make it if this is the first use.

    Raises:
        UntestableError: the archive cannot be reached, or a program is missing.
    """
    parts = [file.read_bytes() for file in (Path(__file__), _INIT, Path(_BUILD.config))]
    target = kept_folder() / f"arm64_kernel_{pages}-{digest(parts)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _make(pages, fresh)
    prune(target)
    return Kernel(target / "image", target / "initramfs")


def _make(pages: str, folder: Path) -> None:
    work = folder / "work"
    archive = Archive(SUITE, work / "apt", ARCHITECTURE)
    kernel = _MAKERS[pages](archive, work / "kernel")
    unpack(archive.fetch(_BUSYBOX), work / "busybox")
    modules = kernel.modules.load_order(_MODULES)
    files = {
        "init": _INIT.read_bytes(),
        "bin/busybox": (work / "busybox/usr/bin/busybox").read_bytes(),
        "modules/order": "".join(f"{name}\n" for name in modules).encode(),
        **{f"modules/{name}.ko": content for name, content in modules.items()},
    }
    (folder / "initramfs").write_bytes(newc_archive(files))
    shutil.copyfile(kernel.image, folder / "image")
    shutil.rmtree(work)


_Maker = Callable[[Archive, Path], guest_kernel.Kernel]
"""Makes a kernel in a folder."""


def _from_package(meta_package: str) -> _Maker:
    def make(archive: Archive, folder: Path) -> guest_kernel.Kernel:
        (package,) = archive.dependencies(meta_package)
        unpack(archive.fetch(package), folder)
        (image,) = (folder / "boot").glob("vmlinuz-*")
        return kernel_of_file(image, _ARM64.name, modules=folder, origin=package)

    return make


def _built(archive: Archive, folder: Path) -> guest_kernel.Kernel:
    kernel = built_kernel(replace(_ARM64, kernel_builds={65536: _BUILD}), 65536)
    if kernel is None:
        raise UntestableError("the architecture arm64 has no kernel with pages of 64 KiB")
    return kernel


_MAKERS: Final[Mapping[str, _Maker]] = {
    "4K": _from_package("linux-image-arm64"),
    "16K": _from_package("linux-image-arm64-16k"),
    "64K": _built,
}
PAGES: Final = tuple(_MAKERS)
