"""A truncated file ends the process, unless the mapping is a `SharedMapping`."""

from __future__ import annotations

import signal
import subprocess
import sys

ANOTHER = """
import mmap, os, sys
from dmaproof._mapping import SharedMapping
fd = os.memfd_create("x")
os.ftruncate(fd, 4096)
shared, other = SharedMapping(fd, 4096, 0), mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
assert memoryview(shared)[0] == 0 and shared.lost
print("SharedMapping: caught", flush=True)
other[0]
"""


def test_another_mapping_still_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.stdout == "SharedMapping: caught\n", done.stderr
    assert done.returncode == -signal.SIGBUS
