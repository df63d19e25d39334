"""The resources of the machine: how many proofs its processors and its free memory allow at a time.

A proof that shares its processors is slower, but no less strict. A lack of memory, however, kills
processes. A proof may therefore start with too few processors if it runs alone, but never with less
memory than it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..qemu.machine import MIB

_CGROUP: Final = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Return the memory left by the kernel (MemAvailable) and a container's limit (cgroup v2)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no limit is set
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    return free


class Resources:
    """The processors and the memory that no proof has reserved yet."""

    def __init__(self, processors: int, memory_bytes: int, *, jobs: int | None = None) -> None:
        """Offer these resources; `jobs` limits the proofs at a time instead of `processors`."""
        self._jobs = jobs
        self._all_processors = self._processors = jobs or processors
        self._all_memory_bytes = self._memory_bytes = memory_bytes
        self._change = asyncio.Condition()

    @classmethod
    def of_this_machine(cls, jobs: int | None) -> Resources:
        """Return the resources that this process may use now."""
        return cls(len(os.sched_getaffinity(0)), free_memory_bytes(), jobs=jobs)

    @contextlib.asynccontextmanager
    async def reserve(self, processors: int, memory_bytes: int) -> AsyncIterator[None]:
        """Wait for the resources of one proof, and reserve them.

        A proof that keeps more processors busy than the machine has gets all of them.

        Raises:
            UntestableError: the proof needs more memory than the machine has.
        """
        processors = 1 if self._jobs else min(processors, self._all_processors)
        if memory_bytes > self._all_memory_bytes:
            raise UntestableError(
                f"the proof needs {memory_bytes // MIB} MiB of memory, but only "
                f"{self._all_memory_bytes // MIB} MiB are free: end other programs, or choose a "
                "smaller --memory"
            )
        async with self._change:
            await self._change.wait_for(
                lambda: self._processors >= processors and self._memory_bytes >= memory_bytes
            )
            self._processors -= processors
            self._memory_bytes -= memory_bytes
        try:
            yield
        finally:
            self._processors += processors
            self._memory_bytes += memory_bytes
            async with self._change:
                self._change.notify_all()
