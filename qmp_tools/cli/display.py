"""What a person sees of a command: bars and tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dmaproof.errors import printable

from ..proof.display import Display, LineDisplay, QuietDisplay


def display(*, quiet: bool = False) -> Display:
    """The display that fits standard error."""
    if quiet:
        return QuietDisplay()
    if not sys.stderr.isatty():
        return LineDisplay()
    from ..cli.terminal import TerminalDisplay  # imports rich, which takes its time

    return TerminalDisplay()


def print_text(text: str) -> None:
    """Print a report on standard output; it may quote processes and guests that are not ours."""
    print(printable(text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: drawn on a terminal, padded lines elsewhere."""
    if sys.stdout.isatty():
        from ..cli.terminal import draw_table

        draw_table(headings, rows)
        return
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
