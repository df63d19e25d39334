"""Descriptions of the operating system's errors, for messages."""

from __future__ import annotations

import errno
from typing import Final

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a write that a full file system, a quota or 'ulimit -f' stops."""


def describe(error: OSError) -> str:
    """Return the error's text, preceded by the file's name if the error has one."""
    what = error.strerror or str(error)
    if error.errno == errno.EFBIG:
        what += " ('ulimit -f' shows the limit)"
    return f"{error.filename}: {what}" if error.filename is not None else what
