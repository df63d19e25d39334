"""Coroutines run for synchronous callers: results, errors, interrupts, and leftovers."""

from __future__ import annotations

import asyncio
import threading
from typing import NoReturn

import pytest

from qmp_tools.host.loop_thread import LoopThread


async def _answer() -> int:
    await asyncio.sleep(0)
    return 42


async def _refuse() -> NoReturn:
    raise ValueError("no")


def test_the_caller_gets_results_and_errors() -> None:
    with LoopThread() as loop:
        assert loop.run(_answer()) == 42
        with pytest.raises(ValueError, match="no"):
            loop.run(_refuse())
        assert loop.run(_answer()) == 42, "an error does not end the loop"


def test_a_caller_may_run_in_an_event_loop_of_its_own() -> None:
    async def caller() -> int:
        with LoopThread() as loop:
            return loop.run(_answer())

    assert asyncio.run(caller()) == 42


def test_the_loop_keeps_running_between_two_calls() -> None:
    called = threading.Event()

    async def begin() -> None:
        asyncio.get_running_loop().call_later(0.01, called.set)

    with LoopThread() as loop:
        loop.run(begin())
        assert called.wait(60)


def test_an_interrupt_cancels_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    running, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        running.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupted(future: object, timeout: float | None = None) -> NoReturn:
        assert running.wait(60)
        raise KeyboardInterrupt

    with LoopThread() as loop:
        with monkeypatch.context() as patch:
            patch.setattr("concurrent.futures.Future.result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loop.run(work())
        assert cancelled.wait(60)
        assert loop.run(_answer()) == 42


def test_leaving_cancels_open_tasks_and_ends_the_thread() -> None:
    ended = threading.Event()

    async def leave_something() -> asyncio.Task[None]:
        async def sleep_long() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.set()

        task = asyncio.ensure_future(sleep_long())
        await asyncio.sleep(0)
        return task

    with LoopThread() as loop:
        task = loop.run(leave_something())
    assert ended.is_set()
    assert task.cancelled()
    assert not [thread for thread in threading.enumerate() if thread.name == "dmaproof"]
