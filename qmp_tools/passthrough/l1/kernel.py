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

from ...guest.build import cache, sources
from ...guest.kernel_build import BUILD_TIMEOUT_S, CONFIGURE, build_tree, options_of
from ...host.archive import Archive
from ...host.cached_folder import digest, fresh_folder, prune
from ...host.unpacked_root import run_inside
from .root import SUITE
from .selftests import SELFTESTS, build_script, collect_selftests

_logger = logging.getLogger(__name__)

MODULE: Final = "dmaproof_vfio"
KERNELS: Final = {"7.3": SUITE}
"""The suite that has the source of each version; the first version is the default."""
DEFAULT_KERNEL: Final = next(iter(KERNELS))
CONFIG: Final = "kernel.config"
KERNEL_MODULES: Final = ("drivers/vfio/mdev/mdev.ko",)

_PRUNE: Final = """\
find . -mindepth 1 -maxdepth 1 ! -name include ! -name scripts ! -name arch ! -name tools \\
    ! -name Makefile ! -name .config ! -name Module.symvers ! -name vmlinux -exec rm -rf {} +
find arch -mindepth 1 -maxdepth 1 ! -name x86 -exec rm -rf {} +
find tools -mindepth 1 -maxdepth 1 ! -name objtool ! -name include ! -name scripts \\
    -exec rm -rf {} +
find . -name '*.o' ! -path './scripts/*' -delete
"""
_BUILD_SELFTESTS: Final = build_script("make -s", "/mnt", "/mnt")
_BUILD_MODULE: Final = 'make -s -C /mnt/kernel M=/mnt/module -j"$JOBS" modules'


def l1_kernel(root: Path, version: str) -> Path:
    """Build the kernel, or take it from the cache; return its folder.

    The folder has ``vmlinux``, the kernel's own modules in ``modules/``, its selftests in
    ``selftests/``, and in ``build/`` what other modules are built against.

    Raises:
        UntestableError: the kernel cannot be built here.
    """
    config = sources() / "passthrough" / CONFIG
    options = "\n".join(options_of(config)).encode()
    made_of = [options, (root / "packages").read_bytes(), CONFIGURE.encode()]
    made_of.append(_BUILD_SELFTESTS.encode())
    target = cache() / "l1" / f"kernel-{version}-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _build_kernel(root, version, config, fresh)
    return prune(target)


def _build_kernel(root: Path, version: str, config: Path, fresh: Path) -> None:
    tree = fresh / "build"
    tree.mkdir()

    def run(script: str, what: str) -> str:
        script = f"cd /mnt\n{script}"
        return run_inside(root, tree, script, what, BUILD_TIMEOUT_S, JOBS=jobs())

    package = f"linux-source-{version}"
    _logger.info("fetching %s from %s (first use only)", package, KERNELS[version])
    deb = Archive(KERNELS[version], fresh / "archive").fetch(package)
    build_tree(tree, deb, config, "vmlinux modules", run)
    shutil.rmtree(fresh / "archive")
    modules = fresh / "modules"
    modules.mkdir()
    for name in KERNEL_MODULES:
        shutil.copy(tree / name, modules)
    write_order(modules)
    run(_BUILD_SELFTESTS, "building the kernel's selftests")
    collect_selftests(tree, fresh / SELFTESTS)
    run(_PRUNE, "tidying up the kernel's build tree")
    (tree / "vmlinux").rename(fresh / "vmlinux")


def write_order(modules: Path) -> None:
    """Write the file ``order``, which lists the kernel's modules in their load order."""
    (modules / "order").write_text("".join(f"{Path(name).name}\n" for name in KERNEL_MODULES))


def jobs() -> str:
    """Return the number of compilers that run at the same time."""
    return str(len(os.sched_getaffinity(0)))


def module_sources() -> list[Path]:
    """Return the files that the fake device's module is built of."""
    folder = sources() / "passthrough" / "module"
    return sorted(file for file in folder.iterdir() if file.suffix in (".c", ".h", ""))


def l1_module(root: Path, kernel: Path) -> Path:
    """Build the fake device's module against `kernel`, or take it from the cache; return its file.

    Raises:
        UntestableError: the build failed; the message has the compiler's output.
    """
    files = module_sources()
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
    run_inside(root, build, _BUILD_MODULE, what, BUILD_TIMEOUT_S, JOBS=jobs())
    (build / "module" / f"{MODULE}.ko").rename(fresh / f"{MODULE}.ko")
    shutil.rmtree(build)
