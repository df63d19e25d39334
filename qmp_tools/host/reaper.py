"""Remove a run's folder when the dmaproof that made it has ended, even by SIGKILL.

This module runs as a script with the folder as its argument and a pipe from dmaproof as standard
input: the end of the pipe means that dmaproof has ended. dmaproof's children die by themselves
(PR_SET_PDEATHSIG, see process.py). The script removes the files and kills the children of third
parties' programs. With ``keep`` as a second argument, the files stay. The script imports none of
dmaproof's modules, so it starts in milliseconds.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

_ATTEMPTS = 50
_PAUSE_S = 0.1
_MARK = "DMAPROOF_RUN"


def marked_environment(folder: Path) -> dict[str, str]:
    """Return an environment that marks a process and its children as part of a run."""
    return {**os.environ, _MARK: str(folder)}


def kill_marked(folder: Path) -> None:
    """Kill all processes of the run of `folder`, and the processes that they start meanwhile."""
    mark = os.fsencode(f"{_MARK}={folder}")
    for _ in range(_ATTEMPTS):
        marked = [entry for entry in Path("/proc").glob("[0-9]*") if _has(entry, mark)]
        for entry in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
        if not marked:
            return
        time.sleep(_PAUSE_S / 10)


def _has(process: Path, mark: bytes) -> bool:
    try:
        return mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:  # the process has ended, or belongs to another user
        return False


def main() -> None:
    """Wait for the end of the pipe, then kill the run's processes and remove its folder."""
    folder, *options = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(Path(folder))
    if options == ["keep"]:
        return
    for _ in range(_ATTEMPTS):  # a dying child may still write files, or remove its sockets
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
