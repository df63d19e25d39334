"""Classify unexpected exceptions: the cause is this machine, or a defect in dmaproof.

Neither is a lost page, so neither may end with Python's exit code for a traceback, which is 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dmaproof.errors import DmaproofError, UntestableError
from dmaproof.system_errors import NO_ROOM, describe

_LACKING: Final = NO_ROOM | {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}
"""The errors of a machine that is short of a resource or a permission."""


_LEAST_FREE_BYTES: Final = 64 << 10
"""With less free space, a process's write may have failed."""


def is_full(folder: Path) -> bool:
    """Return whether the file system of `folder` has hardly any space left."""
    try:
        space = os.statvfs(folder)
    except OSError:
        return False
    return space.f_bavail * space.f_frsize < _LEAST_FREE_BYTES


class CrashError(UntestableError):
    """A defect in dmaproof; the error's cause has the traceback."""


def untestable(error: Exception) -> UntestableError:
    """Turn `error` into the reason why nothing could be tested."""
    if isinstance(error, UntestableError):
        return error
    if isinstance(error, DmaproofError):
        return UntestableError(str(error))
    if isinstance(error, MemoryError):
        return UntestableError("this machine is out of memory; free memory, or use a smaller guest")
    if isinstance(error, subprocess.TimeoutExpired):
        return UntestableError(str(error))
    if isinstance(error, OSError) and error.errno in _LACKING:
        return UntestableError(describe(error))
    return CrashError(
        f"this is a defect in dmaproof ({type(error).__name__}: {error}); please report it with "
        "the traceback"
    )


@contextlib.contextmanager
def writing_to(folder: Path, remedy: str) -> Iterator[None]:
    """Report files in `folder` that cannot be written, together with the `remedy`.

    A program that runs meanwhile may fail for this reason too, and name neither.

    Raises:
        UntestableError: the file system is full, or a file may not be written.
    """
    try:
        yield
    except UntestableError as error:
        # A linker that fails for want of space removes its output, so there is space again.
        full = is_full(folder) or os.strerror(errno.ENOSPC) in str(error)
        if not full or remedy in str(error):
            raise
        raise UntestableError(f"{error}\nno space left in {folder}; {remedy}") from error
    except OSError as error:
        if error.filename is not None:
            place = Path(os.fsdecode(error.filename))
        elif error.errno in NO_ROOM:  # from a write, which does not name its file
            place = folder
        else:
            raise
        if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise
        what = describe(error) if error.filename is not None else f"{folder}: {describe(error)}"
        raise UntestableError(f"{what}; {remedy}") from error
