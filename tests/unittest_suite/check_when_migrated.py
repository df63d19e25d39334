"""Check all RAM when a migration has completed, and then let the destination's guest continue.

The arguments are the paths of a QMP socket of the source and of the destination, which may not
exist yet. The destination must have been started with -S.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from qmp_tools import Check, aio


async def check_when_migrated(source: str, destination: str) -> Check:
    for name, path in (("source", source), ("destination", destination)):
        async with aio.attach(name, path) as qemu:
            async for _ in aio.watch(qemu, 0.1):
                pass  # until the migration is over
    return await aio.check(source, destination, resume=True)


if __name__ == "__main__":
    sockets = sys.argv[1], sys.argv[2]
    while not all(Path(path).is_socket() for path in sockets):
        time.sleep(0.05)
    outcome = asyncio.run(check_when_migrated(*sockets))
    outcome.require_equal()
    print(outcome.sentence)
