"""What an exception means that nobody has expected: that this machine is at fault, or dmaproof.

Neither is a lost page, so neither may end in Python's own exit code for a traceback, which is 1.
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
"""What a machine answers that lacks something, whatever it was asked."""


class CrashError(UntestableError):
    """dmaproof itself is at fault; the error's cause has the traceback."""


def untestable(error: Exception) -> UntestableError:
    """`error` as the reason why nothing could be tested."""
    if isinstance(error, UntestableError):
        return error
    if isinstance(error, DmaproofError):
        return UntestableError(str(error))
    if isinstance(error, MemoryError):
        return UntestableError("this machine has no memory left")
    if isinstance(error, subprocess.TimeoutExpired):
        return UntestableError(str(error))
    if isinstance(error, OSError) and error.errno in _LACKING:
        return UntestableError(describe(error))
    return CrashError(
        f"this is a fault of dmaproof ({type(error).__name__}: {error}); please report it with its "
        "traceback"
    )


@contextlib.contextmanager
def writing_to(folder: Path, remedy: str) -> Iterator[None]:
    """Tell of files in `folder` that cannot be written, and of the `remedy`.

    Raises:
        UntestableError: there is no room for one, or it may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            place = Path(os.fsdecode(error.filename))
        elif error.errno in NO_ROOM:  # by a write, which does not name its file
            place = folder
        else:
            raise
        if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise
        what = describe(error) if error.filename is not None else f"{folder}: {describe(error)}"
        raise UntestableError(f"{what}; {remedy}") from error
