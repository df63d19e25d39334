"""Bound every wait by one number of seconds, which the caller passes down.

``--timeout`` and every `timeout_s` bound each single wait, such as the wait for a QMP answer, for a
report of a guest or a device, or for a migration to complete. They do not bound the sum of the
waits. On a busy machine everything takes much longer, so the default is generous.
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
    """Cancel the body after `timeout_s`, and raise the error that `error` makes.

    Raises:
        WaitTimeoutError: the body took longer.
    """
    try:
        async with asyncio.timeout(timeout_s) as wait:
            yield
    except TimeoutError:
        if not wait.expired():  # the operating system's error, for example of a connection
            raise
        raise error() from None


async def wait_until(
    reached: Callable[[], bool | Awaitable[bool]],
    timeout_s: float,
    error: Callable[[], WaitTimeoutError],
    pause_s: float = _PAUSE_S,
) -> None:
    """Poll until `reached` returns True.

    Args:
        reached: called at least once. A call that has begun is not cancelled.
        timeout_s: no new call begins after this number of seconds.
        error: makes the error that is raised then.
        pause_s: the seconds between two calls.

    Raises:
        WaitTimeoutError: `reached` has not returned True in time.
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
    """Poll until `reached` returns True, like `wait_until`, in code that is not asynchronous.

    Raises:
        WaitTimeoutError: `reached` has not returned True in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline_s:
            raise error()
        time.sleep(pause_s)
