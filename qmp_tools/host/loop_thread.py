"""An event loop in a thread of its own, for callers that are not asynchronous.

QEMU's messages are read, and its processes watched, also while the caller does something else; and
a caller that has an event loop of its own is not in the way.

Processes are to be started through one `LoopThread` for as long as they live: a child's
PR_SET_PDEATHSIG (see process.py) fires when the *thread* that started it ends, see prctl(2).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """The loop and its thread, from entering the context to leaving it."""

    def __enter__(self) -> LoopThread:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="dmaproof", daemon=True)
        self._thread.start()
        return self

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()  # closing the runner cancels what is left

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled where the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # a test framework's time-out too, which may be no Exception
            future.cancel()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
