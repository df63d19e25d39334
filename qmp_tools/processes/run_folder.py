"""The private folder of one run: sockets, logs, evidence; gone when the run is, however it ends.

Three guards, each for the case in which the one before it cannot act: the context manager removes
the folder; the warden (warden.py) removes it when the tool was killed; and the next run sweeps
whatever is left of runs whose tool and warden were killed together. A lock on the folder tells the
living from the dead.
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
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from . import warden

_PREFIX: Final = "dmaproof-"
_LOCK: Final = "lock"
_LONGEST_SOCKET_NAME: Final = "destination-migration.sock"
_SOCKET_PATH_BYTES: Final = 107
"""sockaddr_un.sun_path without its final NUL, see unix(7)."""


@contextlib.contextmanager
def run_folder(*, keep: bool = False) -> Iterator[Path]:
    """A folder (mode 0700) for one run, removed at the end unless `keep`.

    Raises:
        UntestableError: the temporary folder's path is too long for Unix sockets.
    """
    base = Path(tempfile.gettempdir())
    _sweep(base)
    unlocked = Path(tempfile.mkdtemp(prefix="." + _PREFIX, dir=base))
    folder = base / unlocked.name[1:]
    if len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) > _SOCKET_PATH_BYTES:
        unlocked.rmdir()
        raise UntestableError(
            f"{folder} is too long a path for Unix sockets; set TMPDIR to a shorter one"
        )
    if keep:  # without a lock, and so never swept
        unlocked.rename(folder)
        with _warden(folder, "keep"):
            yield folder
        return
    with (unlocked / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(folder)
        with _warden(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # the warden tries again


@contextlib.contextmanager
def _warden(folder: Path, *options: str) -> Iterator[None]:
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", warden.__file__, str(folder), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watch.communicate()


def _sweep(base: Path) -> None:
    """Remove folders of ours whose lock nobody holds; kept ones have none."""
    for folder in base.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open() as lock:
            if os.fstat(lock.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
