"""Several processes on one bitmap: with atomics no bit is lost, without them bits are lost.

This is a model of QEMU's dirty log: devices set bits while QEMU takes the words.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof import _core

WORDS = 1 << 17
BITS = 64 * WORDS
WRITERS = 3
SINGLE_BITS = 2000
"""The number of bits that a writer sets if it sets them one by one."""
ROUNDS = 8000

# Each writer has every third bit, so all writers work in every word. The bytes after the bitmap are
# a barrier: a writer begins when the others have arrived, too.
WRITER = """
import mmap, os, sys
import numpy as np
from dmaproof import _core
fd, number, writers, bits, single, how = sys.argv[1:]
whole = mmap.mmap(int(fd), int(bits) // 8 + mmap.PAGESIZE)
data = memoryview(whole)[: int(bits) // 8]
arrived = memoryview(whole)[int(bits) // 8 :][: int(writers)]
mine = np.arange(int(number), int(bits), int(writers), dtype=np.uint64)
own = np.zeros(int(bits) // 64, dtype=np.uint64)
_core.set_ranges(own, 0, int(bits) - 1, 0, mine, 1, False)
print("ready", flush=True)
for turn, line in enumerate(sys.stdin, 1):
    arrived[int(number)] = turn % 256
    while bytes(arrived) != bytes([turn % 256]) * int(writers):
        os.sched_yield()
    if how.startswith("or"):
        _core.or_bits(data, 0, own, 0, int(bits), how == "or-shared")
    elif how.startswith("page"):
        _core.set_ranges(data, 0, int(bits) - 1, 0, mine, 1, how == "pages-shared")
    else:
        for bit in mine[:int(single)].tolist():
            _core.set_bits(data, bit, 1, how == "bits-shared")
    print("done", flush=True)
"""


class Writers:
    """Processes that set their bits once for each call of `start_round`."""

    def __init__(self, fd: int, how: str) -> None:
        arguments = [str(WRITERS), str(BITS), str(SINGLE_BITS), how]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(fd), str(number), *arguments],
                pass_fds=[fd],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(WRITERS)
        ]
        self.wait()

    def start_round(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    def wait(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline()

    def end(self) -> None:
        for process in self.processes:
            process.communicate()


def lost_bits(how: str, rounds: int, *, harvest: bool) -> int:
    """Run up to `rounds` rounds, and return the number of lost bits of the first round with any."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, BITS // 8 + mmap.PAGESIZE)
    wanted = SINGLE_BITS * WRITERS if how.startswith("bits") else BITS
    with mmap.mmap(fd, BITS // 8) as data:
        writers = Writers(fd, how)
        try:
            for _ in range(rounds):
                found = np.zeros(WORDS, dtype=np.uint64)
                writers.start_round()
                for _ in range(20 if harvest else 0):
                    take(data, found)
                writers.wait()
                take(data, found)
                lost = wanted - int(np.bitwise_count(found).sum())
                if lost:
                    return lost
        finally:
            writers.end()
            os.close(fd)
    return 0


def take(data: mmap.mmap, found: NDArray[np.uint64]) -> None:
    runs = np.frombuffer(_core.take_set(data, 0, BITS), dtype=np.uint64).reshape(-1, 2)
    firsts, counts = (np.ascontiguousarray(column) for column in runs.T)
    _core.set_ranges(found, 0, BITS - 1, 0, firsts, counts, False)


@pytest.mark.parametrize("harvest", [False, True], ids=["", "harvested meanwhile"])
@pytest.mark.parametrize("how", ["pages-shared", "or-shared", "bits-shared"])
def test_no_bit_is_lost_between_processes(how: str, harvest: bool) -> None:
    assert lost_bits(how, 20, harvest=harvest) == 0


@pytest.mark.parametrize("how", ["pages-private", "or-private"])
def test_without_atomics_bits_are_lost(how: str) -> None:
    """This shows that the test above can fail."""
    assert lost_bits(how, ROUNDS, harvest=False) > 0
