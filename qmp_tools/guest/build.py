"""Build guests on this machine and keep them in the user's cache."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmaproof.errors import UntestableError

from ..arch.architecture import Architecture
from ..host import distribution
from ..host.captured import run_captured
from ..host.user_folders import cache_folder
from .workload import Workload


@dataclass(frozen=True)
class Guest:
    """A guest of an `architecture` that carries out a workload; QEMU boots `kernel`.

    `options` precede the workload on the guest's command line. `version` changes with the guest's
    sources. The default workload fits into `memory_bytes` of RAM. If the guest's first request
    under KVM takes longer than `kvm_timeout_s`, KVM is not worth using. `linux` has the release and
    the origin of dmaproof's Linux guest's kernel, for reports.
    """

    name: str
    version: str
    architecture: Architecture
    kernel: Path
    initramfs: Path | None
    options: str
    memory_bytes: int
    kvm_timeout_s: float
    linux: str | None = None

    def command_line(self, workload: Workload) -> str:
        """Return the guest's kernel command line for `workload`."""
        return f"{self.options} {workload}".lstrip()


def cache() -> Path:
    """Return the folder that caches built and fetched guests.

    Raises:
        UntestableError: this user has no cache folder.
    """
    return cache_folder() / "guest"


def sources() -> Path:
    """Return the folder ``guests``: inside the installed package, or beside it in a checkout.

    Raises:
        UntestableError: the folder is missing.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "guests", package.parent / "guests"):
        if (folder / "workload.h").is_file():
            return folder
    raise UntestableError(
        f"the guests' sources are missing next to {package}; install dmaproof again"
    )


def compile_c(
    files: Sequence[Path], target: Path, *options: str, architecture: Architecture | None = None
) -> None:
    """Compile and link `files` for `architecture`; None is that of this machine.

    Raises:
        UntestableError: no C compiler for the architecture is installed, or it fails.
    """
    compiler = "cc" if architecture is None else architecture.compiler
    command = [compiler, "-O2", *options, "-o", str(target), *map(str, files)]
    try:
        done = run_captured(command, timeout_s=300, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        needs = [distribution.COMPILER, distribution.STATIC_LIBC]
        if architecture is not None and not architecture.is_host:
            needs = [distribution.cross_compiler(architecture)]
        raise UntestableError(
            f"building the guest needs the C compiler {compiler}: "
            f"{distribution.how_to_install(*needs)}"
        ) from None
    if done.returncode:
        raise UntestableError(f"{shlex.join(command)} failed:\n{done.stderr}")
