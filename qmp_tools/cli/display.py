"""What a command prints on standard output for people: tables are drawn on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dmaproof.errors import printable


def print_text(text: str) -> None:
    """Print a report on standard output; it may quote processes and guests that are not ours."""
    print(printable(text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: drawn on a terminal, padded lines elsewhere."""
    if sys.stdout.isatty():
        from .terminal import draw_table  # imports rich, which takes its time

        draw_table(headings, rows)
        return
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
