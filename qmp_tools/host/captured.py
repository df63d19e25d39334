"""Run a program that needs no input, and capture what it prints."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


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
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
        preexec_fn=preexec_fn,
    )
