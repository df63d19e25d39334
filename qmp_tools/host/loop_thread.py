"""Run an event loop in a thread, for callers that are not asynchronous.

The thread reads QEMU's messages and watches its processes while the caller does something else. The
caller may run its own event loop.

The `LoopThread` that starts a process must live as long as the process: a child's PR_SET_PDEATHSIG
(see process.py) fires when the *thread* that started the child ends, see prctl(2).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop and its thread, which run until the context ends."""

    def __enter__(self) -> LoopThread:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="dmaproof", daemon=True)
        self._thread.start()
        return self

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()  # closing the runner cancels the remaining tasks

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and return its result; cancel `work` if the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # a test framework's timeout may not derive from Exception
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
