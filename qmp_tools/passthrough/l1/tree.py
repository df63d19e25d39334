"""A kernel of any source tree for L1, built outside the tree, so that it is not modified.

The build has a folder of its own in the cache for each tree, and is incremental: after a change of
one file, make compiles that file only. The tree is mounted read-only at one place of L1's root file
system, whose compiler builds it. Its own path may therefore contain spaces.

What boots is a copy, named by a digest of its content. So another run may build the same tree
meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ...guest.build import cache, sources
from ...guest.kernel_build import BUILD_TIMEOUT_S, KERNEL_CONFIG, configuring
from ...host.cached_folder import changed_folder, digest, fresh_folder, prune, remove_unlocked
from ...host.unpacked_root import SOURCE, run_inside
from .kernel import CONFIG, KERNEL_MODULES, MODULE, jobs, module_sources, write_order
from .root import quoted
from .selftests import SELFTESTS, build_script, collect_selftests, selftest_files

_logger = logging.getLogger(__name__)

_KIND: Final = "tree"
_ORIGIN: Final = "source"
"""The file in a build's folder that has the path of its tree."""
_MAKE: Final = f"make -s -C {SOURCE} O=/mnt/build"
_BUILD: Final = f"""\
if [ -e ../unfinished ]; then
    find . -newer ../unfinished '(' -name '*.[oa]' -o -name '*.ko' -o -name 'vmlinux*' ')' -delete
fi
touch ../unfinished
trap 'rm ../unfinished' EXIT
{_MAKE} -j"$JOBS" vmlinux modules
"""
"""A build that was killed may leave half a file, which make would take for a whole one."""
_BUILD_MODULE: Final = 'make -s -C /mnt/build M=/mnt/module -j"$JOBS" modules'
BUILD_SELFTESTS: Final = build_script(_MAKE, SOURCE, "/mnt/build")
_IN_TREE: Final = (".config", "include/config", "arch/x86/include/generated")
"""What an in-tree build leaves. If one of these exists, kbuild refuses to build with O=."""


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel for L1 and its module.

    `folder` has ``vmlinux``, ``modules/`` and ``selftests/``.
    """

    folder: Path
    module: Path
    origin: str | None
    """Where its source is from, for reports; None for the distribution's without patches."""


def tree_kernel(root: Path, source: Path) -> BuiltKernel:
    """Build the kernel of the tree `source`, or update an earlier build of it.

    Raises:
        UsageError: `source` is not a kernel's source tree, or has been built in-tree.
        UntestableError: the tree cannot be built; the message has the last lines of make.
    """
    source = source.resolve()
    check_source(source)
    folder = folder_of_tree(root, source)
    _remove_orphans(folder.parent)
    with changed_folder(folder):
        prune(folder)
        (folder / _ORIGIN).write_bytes(os.fsencode(source))
        build_outside(root, source, folder, str(source))
        return _published(folder, f"the tree {source}")


def folder_of_tree(root: Path, source: Path) -> Path:
    """Return the folder of the build of the tree with the resolved path `source`."""
    of_tree, of_root = digest([os.fsencode(source)]), digest([(root / "packages").read_bytes()])
    return cache() / "l1" / f"{_KIND}-{of_tree}-{of_root}"


def check_source(source: Path) -> None:
    """Check that `source` is a kernel's tree that kbuild can build outside of it.

    Raises:
        UsageError: it is not; the message says what was found and what to do.
    """
    missing = [name for name in ("Kconfig", "Makefile", "kernel") if not (source / name).exists()]
    if missing:
        raise UsageError(
            f"--kernel-source {source}: not the source tree of a Linux kernel: "
            f"{', '.join(missing)} not found in it; give the folder with the kernel's Makefile"
        )
    for name in _IN_TREE:
        if (source / name).exists():
            raise UsageError(
                f"--kernel-source {source}: the tree has been built in-tree ({name} exists), and "
                "kbuild then refuses to build outside of it; clean it with "
                f"'make -C {quoted(source)} mrproper', which deletes .config too, or give a git "
                "worktree of it"
            )


def build_outside(root: Path, source: Path, folder: Path, name: str) -> None:
    """Build the kernel, its selftests and the fake device's module below `folder`.

    The folders of the build are ``build`` and ``module``. An earlier build in them is updated.

    Args:
        root: L1's root file system, which has the compiler.
        source: the kernel's source.
        folder: where the build is.
        name: the name of the source in messages.

    Raises:
        UntestableError: a step fails.
    """
    build_kernel(root, source, folder, name)
    what = f"building the selftests of {name}"
    _run(root, source, folder, BUILD_SELFTESTS, what)
    _update_module(folder / "module")
    what = f"building the fake device's module for the kernel of {name}"
    _run(root, source, folder, _BUILD_MODULE, what)


def build_kernel(root: Path, source: Path, folder: Path, name: str) -> None:
    """Do the first step of `build_outside`, which takes longest."""
    build, config = folder / "build", sources() / "passthrough" / CONFIG
    is_first = not (build / "vmlinux").exists()
    build.mkdir(exist_ok=True)
    shutil.copy(config, build / KERNEL_CONFIG)
    what = f"configuring the kernel of {name}"
    unmet = _run(root, source, folder, configuring(_MAKE, SOURCE), what)
    if unmet:
        raise UntestableError(f"the kernel of {name} rejects these lines of {config}:\n{unmet}")
    how_long = "the first build takes some minutes" if is_first else "incrementally"
    _logger.info("building the kernel of %s (%s)", name, how_long)
    _run(root, source, folder, _BUILD, f"building the kernel of {name}")


def _run(root: Path, source: Path, folder: Path, script: str, what: str) -> str:
    script = f"cd /mnt/build\n{script}"
    return run_inside(root, folder, script, what, BUILD_TIMEOUT_S, source=source, JOBS=jobs())


def _update_module(folder: Path) -> None:
    """Copy the module's source to `folder`; files that have not changed keep their time."""
    folder.mkdir(exist_ok=True)
    for file in module_sources():
        copy, content = folder / file.name, file.read_bytes()
        if not copy.exists() or copy.read_bytes() != content:
            copy.write_bytes(content)


def collect(folder: Path, target: Path) -> None:
    """Copy what L1 needs of the build in `folder` to `target`.

    Raises:
        UntestableError: the kernel has no mediated devices.
    """
    build, modules = folder / "build", target / "modules"
    modules.mkdir(parents=True)
    for name in KERNEL_MODULES:
        if not (build / name).is_file():
            raise UntestableError(
                f"this kernel has no {name}: its configuration does not have mediated devices "
                "(VFIO_MDEV), which the fake device needs; Linux 6.1 and later have them"
            )
        shutil.copy(build / name, modules)
    write_order(modules)
    shutil.copy(build / "vmlinux", target)
    shutil.copy(folder / "module" / f"{MODULE}.ko", target)
    collect_selftests(build, target / SELFTESTS)


def _published(folder: Path, origin: str) -> BuiltKernel:
    """Return a copy of the kernel in `folder` that later builds do not change."""
    build = folder / "build"
    files = [build / "vmlinux", *(build / name for name in KERNEL_MODULES)]
    files += [folder / "module" / f"{MODULE}.ko", *selftest_files(build)]
    parts = [file.read_bytes() for file in files if file.is_file()]
    target = folder.parent / f"kernel-tree-{digest(parts)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                collect(folder, fresh)
    prune(target)
    return BuiltKernel(target, target / f"{MODULE}.ko", origin)


def _remove_orphans(parent: Path) -> None:
    """Remove the builds of trees that no longer exist."""
    for origin in parent.glob(f"{_KIND}-*/{_ORIGIN}"):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            if not Path(os.fsdecode(origin.read_bytes())).is_dir():
                remove_unlocked(origin.parent)
