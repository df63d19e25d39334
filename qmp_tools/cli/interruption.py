"""Signals that ask the command to end: the first one starts the clean-up.

Further signals during the clean-up, such as a second Ctrl-C, have no effect. A signal that was
ignored when the command was started, as nohup does with SIGHUP, stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, NoReturn, TypeVar

from ..host.blocking_work import forget_interruptions, interrupt_blocking_work

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
    """Return the result of `work`, which the first of the signals cancels or interrupts.

    Raises:
        KeyboardInterrupt: a signal cancelled it.
    """
    import asyncio  # imported here: it would double the time of `dmaproof --help`

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
    """Call `react` at the first of the signals; the process ignores all later ones."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return

    def handle(number: int, frame: object) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        interrupt_blocking_work()
        react()

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {
        number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN
    }
    forget_interruptions()
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
