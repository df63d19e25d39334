"""What every guest shares: it is built on this machine, and kept in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dmaproof.errors import UntestableError

from .workload import Workload

Say = Callable[[str], None]


@dataclass(frozen=True)
class Guest:
    """A guest that carries out a workload; `kernel` is an ELF that QEMU enters by PVH.

    `options` stand before the workload on its command line. `version` changes with what it is made
    of. `memory_bytes` of RAM do for the default workload. `kvm_patience_s`: where KVM takes longer
    to its first request, it is not worth using.
    """

    name: str
    version: str
    kernel: Path
    initramfs: Path | None
    options: str
    memory_bytes: int
    kvm_patience_s: float

    def command_line(self, workload: Workload) -> str:
        """What is to be told to the guest that it may carry out `workload`."""
        return f"{self.options} {workload}".lstrip()


def cache() -> Path:
    """Where what was built and fetched for guests is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dmaproof" / "guest"


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
    """A folder to fill in `target`'s place, or None if another process has filled it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        for left in target.parent.glob("new-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=target.parent))
        try:
            yield fresh
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def compile_c(files: Sequence[Path], target: Path, *options: str) -> None:
    """Compile and link `files` with the machine's C compiler.

    Raises:
        UntestableError: there is no compiler, or it refuses.
    """
    command = ["cc", "-O2", *options, "-o", str(target), *map(str, files)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        raise UntestableError(
            "a C compiler is needed to build the guest: apt-get install gcc libc6-dev"
        ) from None
    if done.returncode:
        raise UntestableError(f"{shlex.join(command)} failed:\n{done.stderr}")
