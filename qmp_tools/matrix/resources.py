"""Room on the machine: so many proofs at a time as its processors and its free memory hold.

A proof that shares its processors is slower and no less strict, but memory that is not there ends
processes; so processors are handed out as far as they go, and memory never beyond what is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..proof.model import Setup
from ..qemu.machine import MIB

_CGROUP: Final = Path("/sys/fs/cgroup")
_OVERHEAD_BYTES: Final = 400 * MIB
"""Of a proof besides its guests' RAM: two QEMUs, the device and the tool."""


def free_memory_bytes() -> int:
    """What the kernel (MemAvailable) and a container's limit (cgroup v2) leave."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no such limit
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    return free


class Room:
    """What is left of `processors` and `memory_bytes`."""

    def __init__(self, processors: int, memory_bytes: int, *, jobs: int | None = None) -> None:
        """With `jobs`, so many proofs at a time, whatever the processors."""
        self._jobs = jobs
        self._all_processors = self._processors = jobs or processors
        self._all_memory_bytes = self._memory_bytes = memory_bytes
        self._change = asyncio.Condition()

    @classmethod
    def of_this_machine(cls, jobs: int | None) -> Room:
        """All that this process may use now."""
        return cls(len(os.sched_getaffinity(0)), free_memory_bytes(), jobs=jobs)

    @contextlib.asynccontextmanager
    async def take(self, setup: Setup) -> AsyncIterator[None]:
        """Wait for room for one proof, and hold it. One alone may have too few processors.

        Raises:
            UntestableError: the memory would not do for this proof alone.
        """
        # The vCPUs of one side at a time are at work, and the device.
        processors = 1 if self._jobs else min(setup.machine.cpus + 1, self._all_processors)
        memory_bytes = 2 * setup.machine.memory_bytes + _OVERHEAD_BYTES
        if memory_bytes > self._all_memory_bytes:
            raise UntestableError(
                f"it needs {memory_bytes // MIB} MiB of memory, and "
                f"{self._all_memory_bytes // MIB} MiB are free"
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
