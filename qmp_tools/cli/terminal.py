"""What is drawn on a terminal: the progress bar, and tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from dmaproof.errors import printable

from ..migration.migration import Progress


class TerminalDisplay:
    """Lines and a progress bar on a terminal's standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._task: TaskID

    def say(self, text: str) -> None:
        """See `Display.say`."""
        self._console.print(printable(text), highlight=False, markup=False)

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
        self._bar.update(self._task, completed=share, description=progress.summary)
        if progress.status == "completed":
            self.close()

    def close(self) -> None:
        """See `Display.close`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def draw_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Draw a table on standard output."""
    table = Table(*headings)
    for row in rows:
        table.add_row(*map(printable, row))
    Console().print(table, markup=False)
