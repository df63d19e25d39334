"""Folders in the user's cache, each named by a digest of what it was made of."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .blocking_work import blocking_work
from .unexpected import writing_to

_UNUSED_S: Final = 24 * 3600.0
_REMEDY: Final = "set XDG_CACHE_HOME to a writable folder with enough space"


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
