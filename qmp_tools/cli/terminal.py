"""Drawing on a terminal: the progress bar and tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from dmaproof.errors import printable

from ..migration.migration import Progress


class PrecopyBar:
    """A bar on standard error: the share of the RAM that no longer needs to be sent."""

    def __init__(self) -> None:
        self._bar = Bar(
            TextColumn("precopy"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()

    def draw(self, progress: Progress) -> None:
        """Draw this progress."""
        share = 0.0
        if progress.total and progress.remaining is not None:
            share = 1 - min(1.0, progress.remaining / progress.total)
        self._bar.update(self._task, completed=share, description=progress.summary)

    def end(self) -> None:
        """Take the bar off the screen."""
        self._bar.stop()


def draw_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Draw a table on standard output."""
    table = Table(*headings)
    for row in rows:
        table.add_row(*map(printable, row))
    Console().print(table, markup=False)
