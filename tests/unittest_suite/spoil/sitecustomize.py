"""Change one byte of the destination's RAM just before each check, so that the check must fail.

Python imports a module of this name when it starts, if the module's folder is in PYTHONPATH.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from qmp_tools import aio

GPA: Final = 0x200000
original: Final = aio.check


async def check(source: Any, destination: Any, **options: Any) -> Any:
    vcpus = await execute(destination, "query-cpus-fast")
    arguments = {"command-line": f"gpa2hva {GPA:#x}"}
    hva = str(await execute(destination, "human-monitor-command", **arguments)).split()[-1]
    # A vCPU is a thread of QEMU, and shares QEMU's memory.
    memory = os.open(f"/proc/{vcpus[0]['thread-id']}/mem", os.O_WRONLY)
    os.pwrite(memory, b"!", int(hva, 16))
    os.close(memory)
    return await original(source, destination, **options)


async def execute(qemu: Any, command: str, **arguments: Any) -> Any:
    if hasattr(qemu, "cmd"):
        return await asyncio.to_thread(qemu.cmd, command, **arguments)
    return await qemu.execute(command, arguments)


aio.check = check  # qmp_tools.check calls it too
