"""Build guests on this machine and keep them in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..arch.architecture import Architecture
from ..host import distribution
from ..host.blocking_work import blocking_work
from ..host.captured import run_captured
from ..host.unexpected import writing_to
from ..host.user_folders import cache_folder
from .workload import Workload

_UNUSED_S: Final = 24 * 3600.0
_REMEDY: Final = "set XDG_CACHE_HOME to a writable folder with enough space"


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


def digest(parts: Sequence[bytes]) -> str:
    """Return a short digest of `parts`."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path | None]:
    """Make a folder that is renamed to `target` afterwards.

    Another process that makes a folder of the same kind (``kind-digest``) waits.

    Yields:
        The folder to fill; None if another process has made `target` meanwhile.

    Raises:
        UntestableError: the cache is not writable.
    """
    with blocking_work(), writing_to(target.parent, _REMEDY), _fresh_folder(target) as fresh:
        yield fresh


@contextmanager
def _fresh_folder(target: Path) -> Iterator[Path | None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    kind = _kind(target)
    with (target.parent / f"lock-{kind}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        for partial in target.parent.glob(f"partial-{kind}-*"):  # of a process that was killed
            shutil.rmtree(partial, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"partial-{kind}-", dir=target.parent))
        try:
            yield fresh
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def changed_folder(target: Path) -> Iterator[None]:
    """Make the folder `target`, or change what is in it; another process that does so waits.

    Raises:
        UntestableError: the cache is not writable.
    """
    with blocking_work(), writing_to(target.parent, _REMEDY):
        target.mkdir(parents=True, exist_ok=True)
        with (target / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _kind(folder: Path) -> str:
    return folder.name.rpartition("-")[0] or folder.name


def prune(target: Path) -> Path:
    """Lock `target`, named ``kind-digest``, and remove unused folders of the same kind.

    The lock lasts until this process ends. A folder is unused if it is not locked and no process
    has locked it for a day.

    Returns:
        `target`.
    """
    with contextlib.suppress(OSError):  # another user's or a read-only cache, which is not pruned
        os.utime(target)
    fcntl.flock(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH)
    kind = _kind(target)
    for sibling in target.parent.glob(f"{kind}-*"):
        if _kind(sibling) == kind and sibling != target:
            _remove_unused(sibling)
    return target


def _remove_unused(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime >= _UNUSED_S:
            remove_unlocked(folder)
    except FileNotFoundError:  # another process has just removed the folder
        return


def remove_unlocked(folder: Path) -> None:
    """Remove `folder`, unless a process has locked it with `prune`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(number)


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
