"""A folder for tens of thousands of files, such as those of a system or a virtual environment.

On a disk that discards deleted blocks (mount(8), 'discard'), deleting a Debian system takes a
minute. In memory it takes no time.
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
_NEEDED_BYTES: Final = 6 * GIB
"""Free memory that is needed: a Debian system has up to 2 GiB, and tests run in parallel."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder in memory if enough is free, else in the temporary folder.

    It is removed at the end, also when the tests are killed.
    """
    base = os.fspath(_MEMORY) if _memory_is_free() else tempfile.gettempdir()
    with contextlib.ExitStack() as stack:
        with mock.patch("tempfile.tempdir", base):
            folder = stack.enter_context(run_folder())
        yield folder


def _memory_is_free() -> bool:
    try:
        status = os.statvfs(_MEMORY)
        available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
    except (OSError, IndexError):
        return False
    free_bytes = min(status.f_bavail * status.f_frsize, int(available) * 1024)
    return free_bytes >= _NEEDED_BYTES and not status.f_flag & os.ST_NOEXEC
