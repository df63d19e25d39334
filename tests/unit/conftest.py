"""A unit test starts no process: a test that starts one fails."""

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
"""The audit events of Python for starting a process (its manual has a table of all events)."""

_started: list[str] = []


def _note_start(event: str, arguments: tuple[object, ...]) -> None:
    if event in _STARTS:
        _started.append(f"{event}: {arguments[:2]}")


# An audit hook cannot be removed, so one is added for the whole run.
sys.addaudithook(_note_start)


def _fail_if_started() -> None:
    if _started:
        started = "\n".join(_started)
        _started.clear()
        pytest.fail(
            f"a unit test started processes; move it to tests/integration:\n{started}",
            pytrace=False,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin to count here, so that the fixtures of modules and of the whole run are included."""
    _started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Fail a test if its fixtures or its own code started a process."""
    yield
    _fail_if_started()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Fail a test if its fixtures start a process when they end."""
    yield
    _fail_if_started()
