"""Keep the memory of a process readable when the process ends.

The kernel frees the private memory of a process when its last thread has left it. A tracer that has
asked for PTRACE_O_TRACEEXIT (ptrace(2)) stops a thread before that. While it holds the main thread,
/proc/PID/mem can still be read, whatever ended the process: measured for SIGTERM, SIGKILL and
exit().

The tracer is a process of its own (`exit_tracer`): dmaproof may be the parent of the traced
process, and its waits for the child would take the stops that are meant for the tracer. When the
tracer ends, the kernel detaches it, and the traced process continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

from . import exit_tracer
from .process import death_with_parent


class HoldRefusedError(OSError):
    """The kernel does not let this user trace the process."""


class ExitHold:
    """A process whose memory outlives it until the hold ends."""

    def __init__(self, tracer: asyncio.subprocess.Process) -> None:
        assert tracer.stdout is not None
        self._report = asyncio.ensure_future(tracer.stdout.readline())

    async def ended(self) -> bool:
        """Wait until the process ends; return whether its memory can still be read."""
        return await asyncio.shield(self._report) == exit_tracer.ENDING


@contextlib.asynccontextmanager
async def exit_hold(pid: int) -> AsyncIterator[ExitHold]:
    """Hold process `pid` from now on, until the context ends.

    Raises:
        HoldRefusedError: this user may not trace the process, or another program traces it.
    """
    tracer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", exit_tracer.__file__, str(pid)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        preexec_fn=death_with_parent(),
    )
    try:
        assert tracer.stdout is not None
        if await tracer.stdout.readline() != exit_tracer.HELD:
            code = await tracer.wait()
            raise HoldRefusedError(code, os.strerror(code))
        yield ExitHold(tracer)
    finally:
        with contextlib.suppress(ProcessLookupError):
            tracer.kill()
        await asyncio.shield(tracer.wait())
