"""Removes a run's folder when the tool that made it is gone, however it went.

Run as a script with the folder as its argument and a pipe from the tool as standard input: the
pipe's end means that the tool ended, by kill -9 even. The tool's children die by themselves
(PR_SET_PDEATHSIG, see process.py); the files are left to this process, and so are the children of
programs that are not ours. With ``keep`` as a second argument the files stay. It imports nothing of
ours, so that it starts in milliseconds.
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
    """An environment that shows of a process, and of its children, to which run they belong."""
    return {**os.environ, _MARK: str(folder)}


def kill_marked(folder: Path) -> None:
    """Kill all processes that belong to the run of `folder`, and what they start meanwhile."""
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
    except OSError:  # it has gone, or it is somebody else's
        return False


def main() -> None:
    """Wait for the pipe's end, then remove what is left of the run."""
    folder, *options = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(Path(folder))
    if options == ["keep"]:
        return
    for _ in range(_ATTEMPTS):  # a dying child may still be writing, or removing its own sockets
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
