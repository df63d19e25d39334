"""Debian 12's kernel for L1, which need not be built, but has fewer interfaces.

Newer stock kernels have no iommufd, and their iova_bitmap is a stub, so they cannot be tested.
Debian 12's kernel (Linux 6.1) has VFIO's DMA logging, its iterator and type1, but neither iommufd
nor PRE_COPY. The fake device's module is built against its headers. Its drivers are modules, so L1
boots from an initramfs that contains one program, ``guests/passthrough/early_init.c``.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...arch.x86_64 import X86_64
from ...guest.build import cache, compile_c, digest, fresh_folder, prune, sources
from ...guest.initramfs import with_modules
from ...guest.kernel_image import read_kernel_image
from ...guest.modules import Modules, find_modules
from ...host.archive import Archive, unpack

_logger = logging.getLogger(__name__)

STOCK: Final = "stock"
_SUITE: Final = "bookworm"
_PACKAGE: Final = "linux-image-amd64"
_FOR_ROOT: Final = ("virtio_pci", "9pnet_virtio", "9p")
_FOR_PROOFS: Final = (
    *("vfio", "vfio_iommu_type1", "mdev"),
    *("tun", "sch_ingress", "cls_matchall", "act_mirred", "vhost_net", "vhost_vsock"),
    *("configfs", "target_core_file", "vhost_scsi"),
)
_INIT_OPTIONS: Final = ("-static", "-std=c11")


def stock_kernel() -> Path:
    """Return a folder as `l1_kernel` does, which also has an ``initramfs``.

    Raises:
        UntestableError: the archive cannot be reached, or there is no C compiler.
    """
    init = sources() / "passthrough" / "early_init.c"
    parts = [init.read_bytes(), " ".join((_SUITE, _PACKAGE, *_FOR_ROOT, *_FOR_PROOFS)).encode()]
    target = cache() / "l1" / f"kernel-{STOCK}-{digest(parts)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _fill(fresh, init)
    return prune(target)


def _fill(fresh: Path, init: Path) -> None:
    _logger.info("fetching the stock kernel of %s and its headers (first use only)", _SUITE)
    archive = Archive(_SUITE, fresh / "archive")
    image = archive.dependencies(_PACKAGE)[0]
    headers = image.replace("linux-image", "linux-headers")
    needed = [
        name
        for name in archive.dependencies(headers)
        if name.startswith(("linux-headers-", "linux-kbuild-"))
    ]
    unpacked = fresh / "unpacked"
    for package in (image, headers, *needed):
        unpack(archive.fetch(package), unpacked)
    vmlinuz = next((unpacked / "boot").glob("vmlinuz-*"))
    kernel = read_kernel_image(vmlinuz.read_bytes(), vmlinuz.name, X86_64.name)
    (fresh / "vmlinux").write_bytes(kernel.content)
    modules = find_modules(kernel.version or "", vmlinuz, unpacked)
    collect_modules(modules, _FOR_PROOFS, fresh / "modules")
    compile_c([init], fresh / "init", *_INIT_OPTIONS)
    early = modules.load_order(_FOR_ROOT)
    (fresh / "initramfs").write_bytes(with_modules((fresh / "init").read_bytes(), early))
    build_tree(unpacked / "usr", headers, fresh / "build")
    for folder in (unpacked, fresh / "archive"):
        shutil.rmtree(folder)


def collect_modules(modules: Modules, names: Sequence[str], folder: Path) -> None:
    """Copy modules and their dependencies; the file ``order`` lists them in their load order."""
    folder.mkdir()
    order = modules.load_order(names)
    for name, content in order.items():
        (folder / f"{name}.ko").write_bytes(content)
    (folder / "order").write_text("".join(f"{name}.ko\n" for name in order))


def build_tree(unpacked: Path, headers: str, tree: Path) -> None:
    """Copy the headers for building modules into one folder, which is /mnt/kernel in the build.

    Debian's headers are three packages that refer to each other by absolute paths and require
    Debian 12's own compiler.
    """
    shutil.copytree(unpacked / "src" / headers, tree, symlinks=True)
    shutil.copytree(next(unpacked.glob("src/*-common")), tree / "common", symlinks=True)
    shutil.copytree(next(unpacked.glob("lib/linux-kbuild-*")), tree / "kbuild", symlinks=True)
    for folder, beside in ((tree, "kbuild"), (tree / "common", "../kbuild")):
        for link in folder.iterdir():
            if link.is_symlink() and "linux-kbuild" in str(link.readlink()):
                link.unlink()
                link.symlink_to(f"{beside}/{link.name}")
    (tree / "Makefile").write_text("include /mnt/kernel/common/Makefile\n")
    variables = tree / ".kernelvariables"
    variables.write_text(re.sub(r"gcc-\d+", "gcc", variables.read_text()))
