"""A signal ends work that blocks the event loop, and not only the task that does it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from qmp_tools.cli.interruption import run_interruptibly
from qmp_tools.host.blocking_work import (
    blocking_work,
    forget_interruptions,
    interrupt_blocking_work,
    uninterrupted,
)


@pytest.fixture(autouse=True)
def no_interruption() -> Iterator[None]:
    """Forget what a test has interrupted; an interrupted command ignores further signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    forget_interruptions()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_signal_ends_a_task_that_blocks_the_loop() -> None:
    steps: list[str] = []

    async def work() -> None:
        with blocking_work():
            signal.raise_signal(signal.SIGTERM)
            steps.append("blocked on")

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work())
    assert steps == []


def test_a_signal_in_an_uninterrupted_part_takes_effect_at_its_end() -> None:
    steps: list[str] = []

    async def work() -> None:
        with blocking_work():
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                steps.append("uninterrupted")
            steps.append("blocked on")

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work())
    assert steps == ["uninterrupted"]


def test_a_signal_between_two_blocking_steps_prevents_the_second() -> None:
    steps: list[str] = []

    async def work() -> None:
        with blocking_work():
            steps.append("first")
        signal.raise_signal(signal.SIGTERM)
        with blocking_work():
            steps.append("second")

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work())
    assert steps == ["first"]


def test_a_signal_while_nothing_blocks_cancels_the_task() -> None:
    cancelled: list[bool] = []

    async def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work())
    assert cancelled == [True]


def test_an_earlier_command_does_not_interrupt_a_later_one() -> None:
    async def work() -> str:
        with blocking_work():
            return "done"

    interrupt_blocking_work()  # nothing blocks, so it only takes note
    assert run_interruptibly(work()) == "done"


def test_other_threads_are_not_interrupted() -> None:
    interrupt_blocking_work()
    outcome: list[str] = []

    def work() -> None:
        with blocking_work():
            outcome.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == ["done"]
