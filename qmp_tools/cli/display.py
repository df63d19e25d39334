"""Output for people on standard output; a terminal gets drawn tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dmaproof.errors import printable


def print_text(text: str) -> None:
    """Print a report on standard output; it may quote third-party processes and guests."""
    print(printable(text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output: drawn on a terminal, as padded lines elsewhere."""
    if sys.stdout.isatty():
        from .terminal import draw_table  # imports rich, which is slow

        draw_table(headings, rows)
        return
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
