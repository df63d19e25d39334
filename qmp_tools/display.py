"""What a person sees while a proof runs: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .migration.migration import Progress
from .processes.machine import MIB

_LINE_EVERY_S: Final = 1.0


class Display(Protocol):
    """Takes the story of a run as it happens."""

    def say(self, text: str) -> None:
        """A step has begun, or something is worth knowing."""

    def precopy(self, progress: Progress) -> None:
        """The migration is this far."""

    def close(self) -> None:
        """Nothing more will come."""


def _describe(progress: Progress) -> str:
    parts = [f"pass {max(progress.syncs, 1)}"]
    if progress.remaining is not None:
        parts.append(f"{progress.remaining // MIB} MiB remain")
    if progress.mbit_per_s is not None:
        parts.append(f"{progress.mbit_per_s:.0f} Mbit/s")
    if progress.dirty_pages_per_s:
        parts.append(f"{progress.dirty_pages_per_s} dirty pages/s")
    return ", ".join(parts)


class LineDisplay:
    """Plain lines on standard error."""

    def __init__(self) -> None:
        self._next_line_s = 0.0

    def say(self, text: str) -> None:
        """See `Display.say`."""
        print(text, file=sys.stderr, flush=True)

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`: a line now and then."""
        now_s = time.monotonic()
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + _LINE_EVERY_S
            self.say(f"migration {progress.status}: {_describe(progress)}")

    def close(self) -> None:
        """See `Display.close`."""


class TerminalDisplay:
    """Lines and a progress bar on a terminal's standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._task: TaskID

    def say(self, text: str) -> None:
        """See `Display.say`."""
        self._console.print(text, highlight=False, markup=False)

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`: the bar shows how much of what is dirty now has been sent."""
        if self._bar is None:
            self._bar = Bar(
                TextColumn("precopy"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        share = 0.0
        if progress.total and progress.remaining is not None:
            share = 1 - min(1.0, progress.remaining / progress.total)
        self._bar.update(self._task, completed=share, description=_describe(progress))
        if progress.status == "completed":
            self.close()

    def close(self) -> None:
        """See `Display.close`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def display(*, quiet: bool = False) -> Display:
    """The display that fits standard error."""
    if quiet:
        return QuietDisplay()
    console = Console(stderr=True)
    return TerminalDisplay(console) if console.is_terminal else LineDisplay()


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: drawn on a terminal, padded lines elsewhere."""
    console = Console()
    if console.is_terminal:
        table = Table(*headings)
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
        return
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


class QuietDisplay:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """See `Display.say`."""

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`."""

    def close(self) -> None:
        """See `Display.close`."""
