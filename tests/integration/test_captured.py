"""A captured program does not outlive its run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from qmp_tools.host.blocking_work import (
    blocking_work,
    forget_interruptions,
    interrupt_blocking_work,
)
from qmp_tools.host.captured import run_captured
from support.command import is_alive

PROGRAM = ("sleep", "900")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collect the processes that start; as each one starts, a signal may arrive."""
    found: list[int] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            found.append(self.pid)
            interrupt_blocking_work()

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield found
    forget_interruptions()


def test_a_signal_while_a_program_starts_ends_it(started: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), blocking_work():
        run_captured(PROGRAM, timeout_s=900)
    assert [is_alive(pid) for pid in started] == [False]


def test_a_timeout_ends_a_program(started: list[int]) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_captured(PROGRAM, timeout_s=0.1)
    assert [is_alive(pid) for pid in started] == [False]


def test_output_and_exit_code_are_captured() -> None:
    done = run_captured(["sh", "-c", "printf out; printf '\\377' >&2; exit 3"], timeout_s=60)
    assert (done.stdout, done.stderr, done.returncode) == ("out", "\ufffd", 3)
