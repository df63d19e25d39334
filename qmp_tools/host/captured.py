"""Run a program that needs no input, and capture what it prints."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .blocking_work import uninterrupted


def run_captured(
    command: Sequence[str | Path],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    preexec_fn: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Return the exit code of `command` and its output as text; undecodable bytes are replaced.

    Args:
        command: the program and its arguments.
        timeout_s: the bound of the run in seconds.
        cwd: the folder in which the program runs.
        env: its environment; by default that of this process.
        preexec_fn: called in the child before the program.

    Raises:
        OSError: the program could not be executed.
        subprocess.TimeoutExpired: the program has not ended in time, and was killed.
    """
    with contextlib.ExitStack() as stack:
        with uninterrupted():  # else a program that has just been started may be left
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                preexec_fn=preexec_fn,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
        output, errors = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)
