"""L1's kernel and the fake device's module, built from the distribution's kernel source.

The stock kernels have no iommufd and stub the iova_bitmap out, so what is to be tested is not in
them. This one is allnoconfig plus ``guests/passthrough/kernel.config``; it takes some minutes,
once. Of its build tree only what a module is built against is kept.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..guest.build import Say, cache, digest, fresh_folder, sources
from .root import KERNEL_SOURCE, run_inside

MODULE: Final = "dmaproof_vfio"
_CONFIG: Final = "kernel.config"
_TIMEOUT_S: Final = 3600.0
_KERNEL_MODULES: Final = ("drivers/vfio/mdev/mdev.ko",)

_CONFIGURE: Final = f"""\
cd /mnt
tar -xf /usr/src/{KERNEL_SOURCE}.tar.xz --strip-components=1
make -s KCONFIG_ALLCONFIG={_CONFIG} allnoconfig
while read -r line; do
    case $line in
        CONFIG_*) grep -qxF "$line" .config || echo "$line" ;;
    esac
done <{_CONFIG}
"""
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


def l1_kernel(root: Path, say: Say = lambda text: None) -> Path:
    """A folder with ``vmlinux``, the kernel's own modules in ``modules/``, and what is needed to
    build others in ``build/``.

    Raises:
        UntestableError: it cannot be built here.
    """
    config = sources() / "passthrough" / _CONFIG
    made_of = [config.read_bytes(), (root / "packages").read_bytes()]
    target = cache() / "l1" / f"kernel-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _build_kernel(root, config, fresh, say)
    return target


def _build_kernel(root: Path, config: Path, fresh: Path, say: Say) -> None:
    tree = fresh / "build"
    tree.mkdir()
    shutil.copy(config, tree / _CONFIG)
    say(f"unpacking {KERNEL_SOURCE}")
    unmet = run_inside(root, tree, _CONFIGURE, "configuring L1's kernel", _TIMEOUT_S)
    if unmet:
        raise UntestableError(f"{KERNEL_SOURCE} does not take all of {config}:\n{unmet}")
    say("building L1's kernel, once: about 5 minutes on two cores")
    run_inside(root, tree, _BUILD, "building L1's kernel", _TIMEOUT_S, JOBS=_jobs())
    modules = fresh / "modules"
    modules.mkdir()
    for name in _KERNEL_MODULES:
        shutil.copy(tree / name, modules)
    run_inside(root, tree, _PRUNE, "tidying up the kernel's build tree", _TIMEOUT_S)
    (tree / "vmlinux").rename(fresh / "vmlinux")


def _jobs() -> str:
    return str(len(os.sched_getaffinity(0)))


def l1_module(root: Path, kernel: Path, say: Say = lambda text: None) -> Path:
    """The fake device's module, built against `kernel`.

    Raises:
        UntestableError: it does not build; the compiler's words are in the message.
    """
    folder = sources() / "passthrough" / "module"
    files = sorted(file for file in folder.iterdir() if file.suffix in (".c", ".h", ""))
    made_of = [kernel.name.encode()]
    for file in files:
        made_of += [file.name.encode(), file.read_bytes()]
    target = cache() / "l1" / f"module-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                say("building the fake VFIO device's module")
                _build_module(root, kernel, files, fresh)
    return target / f"{MODULE}.ko"


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
