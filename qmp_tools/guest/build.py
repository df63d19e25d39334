"""What every guest shares: it is built on this machine, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..host.unexpected import writing_to
from ..host.user_folders import cache_folder
from .workload import Workload

_UNUSED_S: Final = 24 * 3600.0
_REMEDY: Final = "set XDG_CACHE_HOME to a folder that can be written to, with room"


@dataclass(frozen=True)
class Guest:
    """A guest that carries out a workload; `kernel` is an ELF that QEMU enters by PVH.

    `options` stand before the workload on its command line. `version` changes with what it is made
    of. `memory_bytes` of RAM do for the default workload. `kvm_timeout_s`: where KVM takes longer
    to its first request, it is not worth using.
    """

    name: str
    version: str
    kernel: Path
    initramfs: Path | None
    options: str
    memory_bytes: int
    kvm_timeout_s: float

    def command_line(self, workload: Workload) -> str:
        """What is to be told to the guest that it may carry out `workload`."""
        return f"{self.options} {workload}".lstrip()


def cache() -> Path:
    """Where what was built and fetched for guests is kept.

    Raises:
        UntestableError: this user has no folder for it.
    """
    return cache_folder() / "guest"


def sources() -> Path:
    """The folder ``guests``: inside the installed package, or beside it in a checkout.

    Raises:
        UntestableError: it is not there.
    """
    here = Path(__file__).parents[1]
    for folder in (here / "guests", here.parent / "guests"):
        if (folder / "workload.h").is_file():
            return folder
    raise UntestableError(f"the guests' sources are missing beside {here}; install dmaproof anew")


def digest(parts: Sequence[bytes]) -> str:
    """A short name for what is made of `parts`."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path | None]:
    """A folder to fill in `target`'s place, or None if another process has filled it meanwhile.

    Whoever makes another of the same kind (``kind-digest``) waits.

    Raises:
        UntestableError: the cache cannot be written to.
    """
    with writing_to(target.parent, _REMEDY), _fresh_folder(target) as fresh:
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
        for left in target.parent.glob(f"partial-{kind}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"partial-{kind}-", dir=target.parent))
        try:
            yield fresh
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _kind(folder: Path) -> str:
    return folder.name.rpartition("-")[0] or folder.name


def prune(target: Path) -> Path:
    """Take `target`, named ``kind-digest``, into use, and remove its siblings of the same kind that
    nobody has used for a day.

    A folder that is in use is locked by whoever uses it until that process ends. Returns `target`.
    """
    with contextlib.suppress(OSError):  # of somebody else's, or read-only: nobody removes it there
        os.utime(target)
    fcntl.flock(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH)
    kind = _kind(target)
    for sibling in target.parent.glob(f"{kind}-*"):
        if _kind(sibling) == kind and sibling != target:
            _remove_unused(sibling)
    return target


def _remove_unused(folder: Path) -> None:
    try:
        if time.time() - folder.stat().st_mtime < _UNUSED_S:
            return
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:  # somebody else has just removed it
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(number)


def compile_c(files: Sequence[Path], target: Path, *options: str) -> None:
    """Compile and link `files` with the machine's C compiler.

    Raises:
        UntestableError: there is no compiler, or it refuses.
    """
    command = ["cc", "-O2", *options, "-o", str(target), *map(str, files)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    except FileNotFoundError:
        raise UntestableError(
            "a C compiler is needed to build the guest: apt-get install gcc libc6-dev"
        ) from None
    if done.returncode:
        raise UntestableError(f"{shlex.join(command)} failed:\n{done.stderr}")
