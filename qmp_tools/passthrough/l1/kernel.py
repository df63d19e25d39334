"""L1's kernel and the fake device's module, built from the distribution's kernel source.

Debian's recent stock kernels have no iommufd and only a stub of the iova_bitmap, so they cannot be
tested. This kernel is allnoconfig plus ``guests/passthrough/kernel.config``. Building it
takes some minutes, once for each version. Only the part of the build tree that modules are built
against is kept.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ...guest.build import cache, digest, fresh_folder, prune, sources
from ...host.archive import Archive, unpack
from .root import SUITE, run_inside

_logger = logging.getLogger(__name__)

MODULE: Final = "dmaproof_vfio"
KERNELS: Final = {"7.3": SUITE}
"""The suite that has the source of each version; the first version is the default."""
_CONFIG: Final = "kernel.config"
_TIMEOUT_S: Final = 3600.0
_KERNEL_MODULES: Final = ("drivers/vfio/mdev/mdev.ko",)

_CONFIGURE: Final = f"""\
cd /mnt
tar -xf source.tar.xz --strip-components=1
rm source.tar.xz
make -s KCONFIG_ALLCONFIG={_CONFIG} allnoconfig
find . -name 'Kconfig*' -exec sed -En 's/^(menu)?config[ \\t]+//p' {{}} + >known
while read -r line; do
    case $line in
        CONFIG_*)
            name=${{line#CONFIG_}}
            grep -qxF "$line" .config || ! grep -qxF "${{name%%=*}}" known || echo "$line" ;;
    esac
done <{_CONFIG}
"""
"""Prints each line of the configuration that this version knows and did not accept."""
_BUILD: Final = 'cd /mnt && make -s -j"$JOBS" vmlinux modules'
_PRUNE: Final = """\
cd /mnt
find . -mindepth 1 -maxdepth 1 ! -name include ! -name scripts ! -name arch ! -name tools \\
    ! -name Makefile ! -name .config ! -name Module.symvers ! -name vmlinux -exec rm -rf {} +
find arch -mindepth 1 -maxdepth 1 ! -name x86 -exec rm -rf {} +
find tools -mindepth 1 -maxdepth 1 ! -name objtool ! -name include ! -name scripts \\
    -exec rm -rf {} +
find . -name '*.o' ! -path './scripts/*' -delete
"""
_BUILD_MODULE: Final = 'make -s -C /mnt/kernel M=/mnt/module -j"$JOBS" modules'


def l1_kernel(root: Path, version: str) -> Path:
    """Build the kernel, or take it from the cache; return its folder.

    The folder has ``vmlinux``, the kernel's own modules in ``modules/``, and in ``build/`` what
    other modules are built against.

    Raises:
        UntestableError: the kernel cannot be built here.
    """
    config = sources() / "passthrough" / _CONFIG
    lines = [line for line in config.read_text().splitlines() if line.startswith("CONFIG_")]
    made_of = ["\n".join(lines).encode(), (root / "packages").read_bytes(), _CONFIGURE.encode()]
    target = cache() / "l1" / f"kernel-{version}-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _build_kernel(root, version, config, fresh)
    return prune(target)


def _build_kernel(root: Path, version: str, config: Path, fresh: Path) -> None:
    tree = fresh / "build"
    tree.mkdir()
    shutil.copy(config, tree / _CONFIG)
    package = f"linux-source-{version}"
    _logger.info("fetching %s from %s (first use only)", package, KERNELS[version])
    unpacked = fresh / "unpacked"
    unpack(Archive(KERNELS[version], fresh / "archive").fetch(package), unpacked)
    (unpacked / f"usr/src/{package}.tar.xz").rename(tree / "source.tar.xz")
    for folder in (unpacked, fresh / "archive"):
        shutil.rmtree(folder)
    _logger.info("unpacking %s", package)
    unmet = run_inside(root, tree, _CONFIGURE, "configuring L1's kernel", _TIMEOUT_S)
    if unmet:
        raise UntestableError(f"{package} rejects these lines of {config}:\n{unmet}")
    _logger.info("building L1's kernel %s (first use only; about 5 minutes on two cores)", version)
    run_inside(root, tree, _BUILD, "building L1's kernel", _TIMEOUT_S, JOBS=_jobs())
    modules = fresh / "modules"
    modules.mkdir()
    for name in _KERNEL_MODULES:
        shutil.copy(tree / name, modules)
    (modules / "order").write_text("".join(f"{Path(name).name}\n" for name in _KERNEL_MODULES))
    run_inside(root, tree, _PRUNE, "tidying up the kernel's build tree", _TIMEOUT_S)
    (tree / "vmlinux").rename(fresh / "vmlinux")


def _jobs() -> str:
    return str(len(os.sched_getaffinity(0)))


def l1_module(root: Path, kernel: Path) -> Path:
    """Build the fake device's module against `kernel`, or take it from the cache; return its file.

    Raises:
        UntestableError: the build failed; the message has the compiler's output.
    """
    folder = sources() / "passthrough" / "module"
    files = sorted(file for file in folder.iterdir() if file.suffix in (".c", ".h", ""))
    made_of = [kernel.name.encode()]
    for file in files:
        made_of += [file.name.encode(), file.read_bytes()]
    version = kernel.name.removeprefix("kernel-").rpartition("-")[0]
    target = cache() / "l1" / f"module-{version}-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("building the fake VFIO device's module")
                _build_module(root, kernel, files, fresh)
    return prune(target) / f"{MODULE}.ko"


def _build_module(root: Path, kernel: Path, files: list[Path], fresh: Path) -> None:
    build = fresh / "work"
    (build / "module").mkdir(parents=True)
    for file in files:
        shutil.copy(file, build / "module")
    shutil.copytree(kernel / "build", build / "kernel", symlinks=True)
    what = "building the fake device's module"
    run_inside(root, build, _BUILD_MODULE, what, _TIMEOUT_S, JOBS=_jobs())
    (build / "module" / f"{MODULE}.ko").rename(fresh / f"{MODULE}.ko")
    shutil.rmtree(build)
