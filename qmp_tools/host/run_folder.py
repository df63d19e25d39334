"""Make the private folder of one run, for sockets, logs and evidence, and remove it afterwards.

There are three safeguards. The context manager removes the folder. If dmaproof was killed, the
reaper (reaper.py) removes it. If the reaper was killed too, the next run removes it. A lock on the
folder shows whether its run is still alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Final

from dmaproof.errors import UntestableError

from . import reaper
from .unexpected import writing_to

_PREFIX: Final = "dmaproof-"
_LOCK: Final = "lock"
_LONGEST_SOCKET_NAME: Final = "destination-migration.sock"
_SOCKET_PATH_BYTES: Final = 107
"""sockaddr_un.sun_path without its final NUL, see unix(7)."""
TMPDIR_REMEDY: Final = "set TMPDIR to a writable folder with 200 MiB of free space"
"""A disk's image is 64 MiB, evidence and logs are smaller. A saved stream needs more space."""


@contextlib.contextmanager
def run_folder(*, keep: bool = False) -> Iterator[Path]:
    """Make a folder (mode 0700) for one run, and remove it at the end unless `keep`.

    Raises:
        UntestableError: the temporary folder's path is too long for Unix sockets, or its file
            system is full.
    """
    base = _temporary_folder()
    _sweep(base)
    with writing_to(base, TMPDIR_REMEDY):
        unlocked = Path(tempfile.mkdtemp(prefix="." + _PREFIX, dir=base))
    folder = base / unlocked.name[1:]
    if len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) > _SOCKET_PATH_BYTES:
        unlocked.rmdir()
        raise UntestableError(
            f"the path {folder} is too long for Unix sockets; set TMPDIR to a shorter path"
        )
    if keep:  # without a lock, so that no other run removes the folder
        unlocked.rename(folder)
        with _reaper(folder, "keep"), room_in(folder):
            yield folder
        return
    with _locked(unlocked):
        unlocked.rename(folder)
        with _reaper(folder), room_in(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # the reaper tries again


def room_in(folder: Path) -> AbstractContextManager[None]:
    """Report files in a run's `folder` that cannot be written.

    Raises:
        UntestableError: a file cannot be written.
    """
    return writing_to(folder, TMPDIR_REMEDY)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UntestableError(f"{error.strerror}; {TMPDIR_REMEDY}") from None


def _locked(folder: Path) -> IO[str]:
    with writing_to(folder, TMPDIR_REMEDY):
        lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@contextlib.contextmanager
def _reaper(folder: Path, *options: str) -> Iterator[None]:
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(folder), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watch.communicate()


def _sweep(base: Path) -> None:
    """Remove this user's run folders whose lock is free; kept folders have no lock."""
    for folder in base.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open() as lock:
            if os.fstat(lock.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
