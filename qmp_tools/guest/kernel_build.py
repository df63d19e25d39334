"""Build a small kernel from the source package of the machine's distribution.

A kernel is allnoconfig plus a file of options. Distributions package no kernel with pages of 64 KiB
for arm64. The nested machine's kernels (`passthrough.l1`) are configured in the same way.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError

from ..arch.architecture import Architecture, KernelBuild
from ..host import archive, distribution
from ..host.cached_folder import digest, fresh_folder, prune
from ..host.captured import run_captured
from ..host.reaper import kill_marked, marked_environment
from ..host.run_folder import run_folder
from .build import cache, sources
from .kernel import Kernel, kernel_of_file

_logger = logging.getLogger(__name__)

Run = Callable[[str, str], str]
"""Runs a shell script in the folder of a kernel's source, and returns its output.

Its arguments are the script, and what the script does, for messages.
"""

BUILD_TIMEOUT_S: Final = 3600.0
_SOURCE: Final = "linux-source"
"""The package of the release's own version, which it depends on (Debian and Ubuntu)."""
KERNEL_CONFIG: Final = "dmaproof.config"
_TARBALL: Final = "source.tar"
_IMAGE: Final = "Image"
_ORIGIN: Final = "origin"


def configuring(make: str, source: str) -> str:
    """Return a script that configures a kernel with the lines of the file `KERNEL_CONFIG`.

    The script prints each of these lines that the kernel's version knows and did not accept.

    Args:
        make: the command that runs the kernel's Makefile.
        source: the folder of the source, as the script names it.
    """
    return f"""\
{make} KCONFIG_ALLCONFIG={KERNEL_CONFIG} allnoconfig
find {source} -name 'Kconfig*' -exec sed -En 's/^(menu)?config[ \\t]+//p' {{}} + >known
while read -r line; do
    case $line in
        CONFIG_*)
            name=${{line#CONFIG_}}
            grep -qxF "$line" .config || ! grep -qxF "${{name%%=*}}" known || echo "$line" ;;
    esac
done <{KERNEL_CONFIG}
"""


CONFIGURE: Final = f"""\
tar -xf {_TARBALL} --strip-components=1
rm {_TARBALL}
{configuring("make -s", ".")}"""

_LEFT_OUT: Final = (
    *("Documentation/*/*", "tools/testing/*", "boot/dts/*/*"),
    *(
        f"{folder}/*.[ch]"
        for folder in ("drivers/gpu", "drivers/media", "drivers/staging", "sound")
    ),
)
"""A third of the source's 80,000 files, of which none is used; to delete them takes minutes on some
file systems. Kbuild needs their Kconfig and Makefile."""
_MAKE_VARIABLES: Final = ("MAKE", "KBUILD", "KCONFIG")


def options_of(config: Path) -> list[str]:
    """Return the lines of a configuration that set an option."""
    return [line for line in config.read_text().splitlines() if line.startswith("CONFIG_")]


def build_tree(tree: Path, package: Path, config: Path, goals: str, run: Run) -> None:
    """Build a kernel in the folder `tree`, which need not exist.

    Args:
        tree: the folder.
        package: the distribution's package with the source, a .deb.
        config: the options on top of allnoconfig.
        goals: what make builds.
        run: runs a script in `tree`.

    Raises:
        UntestableError: the package has no source, or `config` has options that the kernel knows
            and does not accept; or the error of `run`.
    """
    archive.unpack(package, tree / "package")
    found = (tree / "package/usr/src").rglob("linux-source-*.tar.*")
    tarball = next((file for file in found if not file.is_symlink()), None)
    if tarball is None:
        raise UntestableError(
            f"{package.name} has no kernel source: usr/src/linux-source-*.tar.* is missing from "
            "the package"
        )
    tarball.rename(tree / _TARBALL)
    shutil.rmtree(tree / "package")
    shutil.copy(config, tree / KERNEL_CONFIG)
    _logger.info("unpacking and configuring the kernel of %s", package.name)
    unmet = run(CONFIGURE, "configuring a kernel")
    if unmet:
        raise UntestableError(f"{package.name} rejects these lines of {config}:\n{unmet}")
    _logger.info("building the kernel (first use only; some minutes)")
    run(f"make -s -j{len(os.sched_getaffinity(0))} {goals}", "building a kernel")


def built_kernel(architecture: Architecture, page_bytes: int) -> Kernel | None:
    """Return the kernel that dmaproof builds itself for pages of `page_bytes`.

    The first call fetches the source and builds the kernel, which takes some minutes.

    Returns:
        The kernel; None if `architecture` has no `kernel_builds` for pages of this size.

    Raises:
        UntestableError: a tool is missing, the source cannot be fetched, or the build fails.
    """
    build = architecture.kernel_builds.get(page_bytes)
    if build is None:
        return None
    folder = build_folder(architecture, build)
    if not folder.is_dir():
        with fresh_folder(folder) as fresh:
            if fresh is not None:
                _build(architecture, build, fresh)
    prune(folder)
    origin = (folder / _ORIGIN).read_text()
    return kernel_of_file(folder / _IMAGE, architecture.name, modules=folder, origin=origin)


def build_folder(architecture: Architecture, build: KernelBuild) -> Path:
    """Return the cached folder of a built kernel, which may not exist yet.

    It has the kernel's image, the list of its drivers, and its configuration.

    Raises:
        UntestableError: a tool that builds kernels is missing.
    """
    release = archive.own_release()
    # A release has one version of the kernel.
    name = f"{release.ids[0]} {release.codename}"
    key = build_key(build, _config(build), _compiler(architecture), name)
    return cache() / f"{Path(build.config).stem}-{architecture.debian}-{key}"


def _config(build: KernelBuild) -> Path:
    return sources() / "linux" / build.config


def build_key(build: KernelBuild, config: Path, compiler: str, release: str) -> str:
    """Return a digest of everything that decides what a built kernel is.

    Args:
        build: what is built.
        config: the options on top of allnoconfig; comments do not count.
        compiler: the compiler's version.
        release: the distribution's release, whose source is built.
    """
    made_of = (release, compiler, build.kbuild, build.goals, build.image, CONFIGURE)
    return digest(["\n".join((*made_of, *options_of(config))).encode()])


def _compiler(architecture: Architecture) -> str:
    """Return the version of the compiler for `architecture`.

    Raises:
        UntestableError: the compiler, or another tool, is missing.
    """
    missing = distribution.missing_kernel_tools()
    needs = [distribution.KERNEL_TOOLS] if missing else []
    compiler = f"{_prefix(architecture)}gcc"
    if shutil.which(compiler) is None and not architecture.is_host:
        missing.append(compiler)
        needs.append(distribution.cross_compiler(architecture))
    if missing:
        raise UntestableError(
            f"building a kernel for {architecture.name} needs {', '.join(missing)}, not found in "
            f"PATH: {distribution.how_to_install(*needs)}"
        )
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0]


def _prefix(architecture: Architecture) -> str:
    return "" if architecture.is_host else f"{architecture.gnu}-"


def _build(architecture: Architecture, build: KernelBuild, fresh: Path) -> None:
    package = archive.dependencies(_SOURCE)[0]
    _logger.info("fetching %s (first use only)", package)
    tree = fresh / "tree"
    tree.mkdir()

    def run(script: str, what: str) -> str:
        return _run_in(tree, script, what, architecture, build)

    deb = archive.fetch_own(package, fresh)
    build_tree(tree, deb, _config(build), build.goals, run)
    shutil.copyfile(tree / build.image, fresh / _IMAGE)
    for name in ("modules.builtin", ".config"):
        shutil.copyfile(tree / name, fresh / name.removeprefix("."))
    (fresh / _ORIGIN).write_text(f"built from {package} with {build.config}")
    deb.unlink()
    shutil.rmtree(tree)


def _run_in(
    tree: Path, script: str, what: str, architecture: Architecture, build: KernelBuild
) -> str:
    """Run a shell script in `tree`, and end every process that it leaves."""
    with run_folder() as folder:
        inherited = marked_environment(folder).items()
        environment = {
            # Variables of a make that runs dmaproof would change the build.
            **{name: value for name, value in inherited if not name.startswith(_MAKE_VARIABLES)},
            "LC_ALL": "C",
            "TMPDIR": str(folder),  # a compiler that is killed leaves its files
            "TAR_OPTIONS": " ".join(f"--exclude=*/{pattern}" for pattern in _LEFT_OUT),
            "ARCH": build.kbuild,
            "CROSS_COMPILE": _prefix(architecture),
        }
        try:
            done = run_captured(
                ["sh", "-ec", script], timeout_s=BUILD_TIMEOUT_S, cwd=tree, env=environment
            )
        except subprocess.TimeoutExpired:
            raise WaitTimeoutError(
                f"{what} has not ended within {BUILD_TIMEOUT_S:g} s; try again when the host is "
                "less busy"
            ) from None
        finally:
            kill_marked(folder)
    if done.returncode:
        lines = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-12:])
        raise UntestableError(f"{what} failed:\n{lines}")
    return done.stdout
