"""A unit test starts no process: one that does so fails, whatever the process was for."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Final

import pytest

_STARTS: Final = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "subprocess.Popen",
}
"""The audit events with which Python starts processes (its manual has a table of all of them)."""

_started: list[str] = []


def _note_start(event: str, arguments: tuple[object, ...]) -> None:
    if event in _STARTS:
        _started.append(f"{event}: {arguments[:2]}")


# Nothing removes an audit hook, so one is added for the whole run.
sys.addaudithook(_note_start)


def _fail_if_started() -> None:
    if _started:
        started = "\n".join(_started)
        _started.clear()
        pytest.fail(
            f"a unit test started processes, and so belongs into tests/integration:\n{started}",
            pytrace=False,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Count from here, so that the fixtures of modules and of the whole run count too."""
    _started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Fail a test whose fixtures or own code started a process."""
    yield
    _fail_if_started()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Fail a test whose fixtures start a process when they end."""
    yield
    _fail_if_started()
