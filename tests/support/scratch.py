"""A folder for tens of thousands of files, such as a system's or an environment's.

Where a disk discards what is deleted (mount(8), 'discard'), it takes a minute to delete a Debian
system from it, and none from memory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from unittest import mock

from qmp_tools.host.run_folder import run_folder
from qmp_tools.qemu.machine import GIB

_MEMORY: Final = Path("/dev/shm")
_ROOM_BYTES: Final = 6 * GIB
"""Of free memory: a Debian system has up to 2 GiB, and tests run side by side."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in memory if that has room, else in the temporary folder.

    It is removed in the end, also when the tests are killed.
    """
    base = os.fspath(_MEMORY) if _memory_has_room() else tempfile.gettempdir()
    with contextlib.ExitStack() as stack:
        with mock.patch("tempfile.tempdir", base):
            folder = stack.enter_context(run_folder())
        yield folder


def _memory_has_room() -> bool:
    try:
        status = os.statvfs(_MEMORY)
        available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
    except (OSError, IndexError):
        return False
    room_bytes = min(status.f_bavail * status.f_frsize, int(available) * 1024)
    return room_bytes >= _ROOM_BYTES and not status.f_flag & os.ST_NOEXEC
