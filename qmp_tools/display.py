"""What a person sees while a proof runs: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Final, Protocol

from dmaproof.errors import printable

from .migration.migration import Progress

_LINE_EVERY_S: Final = 1.0


class Display(Protocol):
    """Takes the story of a run as it happens."""

    def say(self, text: str) -> None:
        """A step has begun, or something is worth knowing."""

    def precopy(self, progress: Progress) -> None:
        """The migration is this far."""

    def close(self) -> None:
        """Nothing more will come."""


class LineDisplay:
    """Plain lines on standard error."""

    def __init__(self) -> None:
        self._next_line_s = 0.0

    def say(self, text: str) -> None:
        """See `Display.say`."""
        print(printable(text), file=sys.stderr, flush=True)

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`: a line now and then."""
        now_s = time.monotonic()
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + _LINE_EVERY_S
            self.say(f"migration {progress.status}: {progress.summary}")

    def close(self) -> None:
        """See `Display.close`."""


class QuietDisplay:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """See `Display.say`."""

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`."""

    def close(self) -> None:
        """See `Display.close`."""


def display(*, quiet: bool = False) -> Display:
    """The display that fits standard error."""
    if quiet:
        return QuietDisplay()
    if not sys.stderr.isatty():
        return LineDisplay()
    from .terminal import TerminalDisplay  # rich is not there in L1

    return TerminalDisplay()


def print_text(text: str) -> None:
    """Print a report on standard output; it may quote processes and guests that are not ours."""
    print(printable(text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: drawn on a terminal, padded lines elsewhere."""
    if sys.stdout.isatty():
        from .terminal import draw_table

        draw_table(headings, rows)
        return
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
