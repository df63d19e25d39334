"""The versions of L1's kernel, and the fake device's module."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Final

from ...guest.build import cache, sources
from ...guest.kernel_build import BUILD_TIMEOUT_S
from ...host.cached_folder import digest, fresh_folder, prune
from ...host.unpacked_root import run_inside
from .root import SUITE

_logger = logging.getLogger(__name__)

MODULE: Final = "dmaproof_vfio"
KERNELS: Final = {"7.3": SUITE}
"""The suite that has the source of each version; the first version is the default."""
DEFAULT_KERNEL: Final = next(iter(KERNELS))
CONFIG: Final = "kernel.config"
KERNEL_MODULES: Final = ("drivers/vfio/mdev/mdev.ko",)

_BUILD_MODULE: Final = 'make -s -C /mnt/kernel M=/mnt/module -j"$JOBS" modules'


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
