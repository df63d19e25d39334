"""Stop the main thread of a process when it ends, so that its memory can still be read.

This module runs as a script; see `exit_hold`. It imports none of dmaproof's modules, so it starts
in milliseconds.
"""

import ctypes
import os
import signal
import sys

HELD = b"held\n"
ENDING = b"ending\n"
_SEIZE = 0x4206  # PTRACE_SEIZE
_LISTEN = 0x4208
_CONTINUE = 7
_TRACE_EXIT = 0x40  # PTRACE_O_TRACEEXIT
_EVENT_EXIT = 6
_EVENT_STOP = 128
_ALL_CHILDREN = 0x40000000  # __WALL
_GROUP_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


def main() -> None:
    """Trace the process that the argument names; print `HELD`, and `ENDING` when it ends.

    The exit code is the kernel's error number if the process cannot be traced.
    """
    pid = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(_SEIZE, pid, None, _TRACE_EXIT) < 0:
        sys.exit(ctypes.get_errno())
    os.write(1, HELD)
    while True:
        _, status = os.waitpid(pid, _ALL_CHILDREN)
        if not os.WIFSTOPPED(status):
            return  # the process has ended without a stop
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == _EVENT_EXIT:
            os.write(1, ENDING)
            signal.pause()  # until dmaproof kills this process
        elif event == _EVENT_STOP:  # after SIGSTOP, or after SIGCONT
            libc.ptrace(_LISTEN if number in _GROUP_STOPS else _CONTINUE, pid, None, None)
        else:  # a signal for the process
            libc.ptrace(_CONTINUE, pid, None, number)


if __name__ == "__main__":
    main()
