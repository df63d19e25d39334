"""Call a blocking function of another library without blocking the event loop.

The call runs in a daemon thread of its own. Neither a cancelled wait nor the end of the program
waits for a call that never returns, as the threads of `asyncio.to_thread` would.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(function: Callable[..., T], *arguments: object) -> T:
    """Return the result of `function(*arguments)`, which runs in a daemon thread."""
    outcome: Future[T] = Future()

    def call() -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            result = function(*arguments)
        except StopIteration as error:  # no future can have it, so nothing would end the wait
            outcome.set_exception(RuntimeError(f"StopIteration: {error}"))
        except BaseException as error:
            with contextlib.suppress(Exception):
                outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=call, name="dmaproof-call", daemon=True).start()
    return await asyncio.wrap_future(outcome)
