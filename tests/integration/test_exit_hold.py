"""The memory of a process can be read after the process was ended, and no process is left over."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_tools.host.exit_hold import HoldRefusedError, exit_hold

TIMEOUT_S = 300.0
_PROGRAM = """
import ctypes, mmap, os, signal, sys, threading, time
memory = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:4] = b"kept"
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
signal.signal(signal.SIGUSR1, lambda *_: print("signalled", flush=True))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    if line == "exit\\n":
        os._exit(0)  # keeps the mapping until the process has ended
    print("answer", flush=True)
"""


class Child:
    """A process with two threads and private memory."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.address = int(self.line())
        self.memory = os.open(f"/proc/{self.process.pid}/mem", os.O_RDONLY)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")

    def content(self) -> bytes:
        return os.pread(self.memory, 4, self.address)


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    yield made
    os.close(made.memory)
    made.process.kill()
    made.process.communicate()


def tracer_of(child: Child) -> int:
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    return int(status.partition("TracerPid:")[2].split()[0])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL, None], ids=str)
def test_the_memory_outlives_the_process(child: Child, end: signal.Signals | None) -> None:
    async def hold() -> None:
        async with exit_hold(child.process.pid) as held:
            if end is None:
                child.say("exit")
            else:
                child.process.send_signal(end)
            assert await asyncio.wait_for(held.ended(), TIMEOUT_S)
            assert child.content() == b"kept"
            assert child.process.poll() is None, "the parent must not see the stop of the tracer"

    asyncio.run(hold())
    assert child.process.wait(TIMEOUT_S) == (0 if end is None else -end)
    assert child.content() == b""


def test_a_held_process_runs_on_and_is_released(child: Child) -> None:
    async def hold() -> None:
        async with exit_hold(child.process.pid):
            assert tracer_of(child)
            child.process.send_signal(signal.SIGUSR1)
            assert child.line() == "signalled\n"
            child.process.send_signal(signal.SIGSTOP)
            child.process.send_signal(signal.SIGCONT)
            child.say("?")
            assert child.line() == "answer\n"

    asyncio.run(hold())
    assert tracer_of(child) == 0
    child.say("?")
    assert child.line() == "answer\n"


def test_a_process_that_is_traced_already_is_refused(child: Child) -> None:
    async def hold() -> None:
        async with exit_hold(child.process.pid):
            with pytest.raises(HoldRefusedError, match="Operation not permitted"):
                async with exit_hold(child.process.pid):
                    pass
            assert tracer_of(child), "the first hold stays"

    asyncio.run(hold())


def test_a_process_that_does_not_exist_is_refused() -> None:
    async def hold() -> None:
        async with exit_hold(1 << 30):
            pass

    with pytest.raises(HoldRefusedError, match="No such process"):
        asyncio.run(hold())


def test_the_tracer_ends_with_the_program_that_started_it(child: Child) -> None:
    program = f"""
import asyncio, os
from qmp_tools.host.exit_hold import exit_hold
async def hold():
    async with exit_hold({child.process.pid}):
        os.kill(os.getpid(), 9)
asyncio.run(hold())
"""
    subprocess.run([sys.executable, "-c", program], timeout=TIMEOUT_S, check=False)
    child.say("?")
    assert child.line() == "answer\n"
    while tracer_of(child):  # the kernel kills the tracer with its parent
        pass
