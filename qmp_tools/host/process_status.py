"""What the kernel reports about processes and their threads in /proc (proc_pid_status(5))."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
"""The mount point of procfs."""


def user_and_group(pid: int, *, proc: Path = PROC) -> tuple[int, int]:
    """Return the user and the group with which process `pid` opens files.

    The owner of /proc/PID may differ: it is root if the process is not dumpable.
    """
    process = proc / str(pid)
    return _numbers(process, "Uid")[-1], _numbers(process, "Gid")[-1]


def has_thread(pid: int, thread: int, *, proc: Path = PROC) -> bool:
    """Return whether process `pid` has a thread whose id in its own PID namespace is `thread`."""
    for task in (proc / str(pid) / "task").glob("*"):
        with contextlib.suppress(OSError):  # the thread has ended
            if _own_id(task) == thread:
                return True
    return False


def process_of_thread(thread: int, *, proc: Path = PROC) -> int | None:
    """Return the process of a `thread` in this PID namespace; None if there is no such thread."""
    task = proc / str(thread)
    try:
        if _own_id(task) == thread:  # else a thread of another namespace
            return _numbers(task, "Tgid")[0]
    except OSError:
        pass
    return None


def tracer_of(pid: int, *, proc: Path = PROC) -> int:
    """Return the process that traces process `pid`; 0 if there is none."""
    try:
        return _numbers(proc / str(pid), "TracerPid")[0]
    except (OSError, IndexError):
        return 0


def _own_id(task: Path) -> int | None:
    """Return the id of a thread in its own PID namespace; None if it is unknown."""
    # A kernel without PID namespaces has no NSpid.
    ids = _numbers(task, "NSpid") or _numbers(task, "Pid")
    return ids[-1] if ids else None


def _numbers(process: Path, key: str) -> list[int]:
    """Return the numbers after `key` in /proc/PID/status."""
    for line in (process / "status").read_text().splitlines():
        name, _, values = line.partition(":")
        if name == key:
            return [int(value) for value in values.split()]
    return []
