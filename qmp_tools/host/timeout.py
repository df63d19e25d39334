"""The bound of every wait: one number of seconds, which the caller passes down.

``--timeout`` and every `timeout_s` bound each single wait: for a QMP answer, for what a guest or a
device is to report, for a migration to complete. They do not bound the sum of these. What can be
waited for takes much longer on a busy machine than on a quiet one, so the default is generous.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from dmaproof.errors import WaitTimeoutError

DEFAULT_TIMEOUT_S: Final = 300.0


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
