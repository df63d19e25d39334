"""The bound of every wait: one number of seconds, which the caller passes down.

``--timeout`` and every `timeout_s` bound each single wait: for a QMP answer, for what a guest or a
device is to report, for a migration to complete. They do not bound the sum of these. What can be
waited for takes much longer on a busy machine than on a quiet one, so the default is generous.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from dmaproof.errors import WaitTimeoutError

DEFAULT_TIMEOUT_S: Final = 300.0
_PAUSE_S: Final = 0.01


@asynccontextmanager
async def bounded(timeout_s: float, error: Callable[[], WaitTimeoutError]) -> AsyncIterator[None]:
    """Raise what `error` makes if the body takes longer than `timeout_s`.

    Raises:
        WaitTimeoutError: the body was cancelled, because its time was over.
    """
    try:
        async with asyncio.timeout(timeout_s) as wait:
            yield
    except TimeoutError:
        if not wait.expired():  # the system's own, as of a connection
            raise
        raise error() from None


async def wait_until(
    reached: Callable[[], bool | Awaitable[bool]],
    timeout_s: float,
    error: Callable[[], WaitTimeoutError],
    pause_s: float = _PAUSE_S,
) -> None:
    """Look again and again until something is reached of which nobody brings news.

    Args:
        reached: looks, once at least. A look that has begun is not cancelled.
        timeout_s: for how many seconds a new look begins.
        error: makes what is raised after that.
        pause_s: seconds between two looks.

    Raises:
        WaitTimeoutError: it is not reached in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = reached()
        if await found if inspect.isawaitable(found) else found:
            return
        if time.monotonic() > deadline_s:
            raise error()
        await asyncio.sleep(pause_s)


def block_until(
    reached: Callable[[], bool],
    timeout_s: float,
    error: Callable[[], WaitTimeoutError],
    pause_s: float = _PAUSE_S,
) -> None:
    """Do what `wait_until` does, for code that is not asynchronous.

    Raises:
        WaitTimeoutError: it is not reached in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline_s:
            raise error()
        time.sleep(pause_s)
