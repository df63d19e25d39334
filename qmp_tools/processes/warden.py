"""Removes a run's folder when the tool that made it is gone, however it went.

Run as a script with the folder as its argument and a pipe from the tool as standard input: the
pipe's end means that the tool ended, by kill -9 even. The tool's children die by themselves
(PR_SET_PDEATHSIG, see process.py); the files are left to this process. It imports nothing of ours,
so that it starts in milliseconds.
"""

import os
import shutil
import signal
import sys
import time

_ATTEMPTS = 50
_PAUSE_S = 0.1


def main() -> None:
    """Wait for the pipe's end, then remove what is left of the folder."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for _ in range(_ATTEMPTS):  # a dying child may still be writing, or removing its own sockets
        shutil.rmtree(sys.argv[1], ignore_errors=True)
        if not os.path.lexists(sys.argv[1]):
            return
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
