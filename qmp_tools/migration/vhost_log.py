"""Open QEMU's vhost log, in which out-of-process devices mark the pages that they have written.

The log is a memfd with one bit for each 4 KiB of guest-physical addresses. It exists while dirty
logging is on. QEMU takes the bits at its bitmap syncs, word by word, by an atomic exchange with 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..qemu.attachment import owner_name

_NAME: Final = "/memfd:vhost-log"


@contextlib.contextmanager
def vhost_log(pid: int, name: str, flags: int) -> Iterator[int | None]:
    """Open the vhost log of process `pid`, called `name` in messages, with `flags`.

    Yields:
        The file descriptor; None if the process has no log.

    Raises:
        UntestableError: this user may not open the process's files.
    """
    fd = _open(pid, name, flags)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _open(pid: int, name: str, flags: int) -> int | None:
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry).startswith(_NAME):  # noqa: PTH115  (names no path)
                    return os.open(entry, flags | os.O_CLOEXEC)
    except PermissionError:
        owner = owner_name(Path(f"/proc/{pid}").stat().st_uid)
        raise UntestableError(
            f"{name} (process {pid}) belongs to user {owner}; run dmaproof as {owner} or as root"
        ) from None
    except FileNotFoundError:  # the process has ended, which QMP reports better
        pass
    return None
