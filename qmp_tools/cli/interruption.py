"""Signals that ask for an end: the first is obeyed, and what was begun is cleaned up.

Those that come meanwhile (an impatient second Ctrl-C) change nothing. Nor does one that was ignored
when the command was started, as nohup does with SIGHUP.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have the first of the signals raise KeyboardInterrupt."""
    with _first_signal(_interrupt):
        yield


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def run_interruptibly(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which the first of the signals cancels.

    Raises:
        KeyboardInterrupt: one did.
    """
    import asyncio  # only now: `dmaproof --help` would spend half of its time on it

    async def cancellable() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)
        with _first_signal(lambda: loop.call_soon_threadsafe(task.cancel)):
            return await task

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _first_signal(react: Callable[[], object]) -> Iterator[None]:
    """`react` to the first of the signals; from then on this process ignores them, to its end."""
    if threading.current_thread() is not threading.main_thread():  # which has the signals
        yield
        return

    def handle(number: int, frame: object) -> None:
        for it in before:
            signal.signal(it, signal.SIG_IGN)
        react()

    handlers = {it: signal.getsignal(it) for it in _SIGNALS}
    before = {it: handler for it, handler in handlers.items() if handler is not signal.SIG_IGN}
    for it in before:
        signal.signal(it, handle)
    try:
        yield
    finally:
        for it, handler in before.items():
            if signal.getsignal(it) is not signal.SIG_IGN:
                signal.signal(it, handler)
