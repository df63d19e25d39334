"""Let a signal end work that blocks the event loop, such as a compiler's run.

A signal usually cancels a task (`cli.interruption`). The task gets to know that only when the event
loop runs again, and until then the work would continue: for minutes, where it builds a kernel.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_interrupted = threading.Event()
_thread = threading.local()


@contextlib.contextmanager
def blocking_work() -> Iterator[None]:
    """Have a signal raise KeyboardInterrupt in this work, if it runs in the main thread.

    Raises:
        KeyboardInterrupt: a signal has arrived, in this work or before it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and _interrupted.is_set():
        raise KeyboardInterrupt
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer a signal's KeyboardInterrupt to the end of this part of `blocking_work`.

    Raises:
        KeyboardInterrupt: a signal has arrived.
    """
    depth = getattr(_thread, "depth", 0)
    _thread.depth = 0
    try:
        yield
    finally:
        _thread.depth = depth
    is_main = threading.current_thread() is threading.main_thread()
    if depth and is_main and _interrupted.is_set():
        raise KeyboardInterrupt


def interrupt_blocking_work() -> None:
    """Interrupt the blocking work of this thread; called by the handler of a signal.

    Raises:
        KeyboardInterrupt: this thread is in such work.
    """
    _interrupted.set()
    if getattr(_thread, "depth", 0):
        raise KeyboardInterrupt


def forget_interruptions() -> None:
    """Forget the signals that have arrived before."""
    _interrupted.clear()
