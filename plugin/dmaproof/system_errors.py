"""What the operating system's refusals are called in messages."""

from __future__ import annotations

import errno
from typing import Final

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a write is answered for which a file system, a quota or 'ulimit -f' has no room."""


def describe(error: OSError) -> str:
    """The file, where there is one, and what is wrong with it."""
    what = error.strerror or str(error)
    if error.errno == errno.EFBIG:
        what += " ('ulimit -f' shows what is allowed)"
    return f"{error.filename}: {what}" if error.filename is not None else what
