"""The dmaproof command as tests run it: with bounded waits, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import jsonschema

TIMEOUT_S = 900.0
"""Bound of each wait of a test: far more than a wait takes, since machines may be busy."""

_SCHEMA: Final = jsonschema.Draft202012Validator(
    json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
)


@dataclass
class Outcome:
    """The exit code and the output of a run of the command."""

    exit_code: int
    output: str
    errors: str

    @property
    def report(self) -> dict[str, Any]:
        """The report of ``--json -``, checked against its schema."""
        answer: dict[str, Any] = json.loads(self.output)
        _SCHEMA.validate(answer)
        return answer


class Tool:
    """Runs dmaproof with `folder` as its temporary folder; `wrapper` is a command to run it by."""

    def __init__(self, folder: Path, wrapper: Sequence[str] = ()) -> None:
        self.folder = folder
        self.wrapper = wrapper

    def start(self, *arguments: str) -> Running:
        """Start the command, and return while it runs."""
        process = subprocess.Popen(
            [*self.wrapper, sys.executable, "-m", "qmp_tools.cli", *arguments],
            env={**os.environ, "TMPDIR": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Running(process)

    def run(self, *arguments: str) -> Outcome:
        """Run the command to its end."""
        return self.start(*arguments).finish()

    def leftovers(self) -> list[Path]:
        """Return the files in the temporary folder."""
        return sorted(self.folder.iterdir())


@dataclass
class Running:
    """A running command, whose output lines are collected."""

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        streams = ((self.process.stdout, self.output), (self.process.stderr, self.errors))
        self._readers = [
            threading.Thread(target=self._read, args=arguments, daemon=True)
            for arguments in streams
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: IO[str], lines: list[str]) -> None:
        with stream:
            lines.extend(stream)

    def wait_for(self, reached: Callable[[], object], what: str) -> None:
        """Wait until `reached` is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not reached():
            assert time.monotonic() < deadline, f"no {what} in time:\n{''.join(self.errors)}"
            assert self.process.poll() is None, f"ended before {what}:\n{''.join(self.errors)}"
            time.sleep(0.01)

    def wait_for_line(self, start: str) -> None:
        """Wait until a line of standard error starts with `start`."""
        self.wait_for(lambda: any(line.startswith(start) for line in self.errors), repr(start))

    def children(self) -> dict[str, int]:
        """Return the process ids by name: 'source', 'destination', 'device', and others."""
        return {name: pid for pid, name in self._children()}

    def machines(self) -> list[int]:
        """Return the process ids of the command's L1 machines."""
        return [pid for pid, name in self._children() if name == "source"]

    def _children(self) -> Iterator[tuple[int, str]]:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if parent == self.process.pid:
                    yield int(entry.name), _name_of(words)

    def finish(self) -> Outcome:
        """Wait until the command has ended."""
        try:
            self._readers[0].join()
            code = self.process.wait(TIMEOUT_S)
        finally:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for reader in self._readers:
            reader.join()
        return Outcome(code, "".join(self.output), "".join(self.errors))


def _name_of(words: list[bytes]) -> str:
    if b"dmaproof.vhost_user" in words:
        return "device"
    if b"-incoming" in words:
        return "destination"
    if b"-nodefaults" in words:
        return "source"
    return words[-2].decode() if len(words) > 1 else ""


def is_alive(pid: int) -> bool:
    """Return whether a process still runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
