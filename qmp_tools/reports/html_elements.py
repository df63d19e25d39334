"""What pages are made of: sections, figures, tables, legends, notes. All text is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final

Json = Mapping[str, Any]

_ROWS_SHOWN: Final = 500
_ROWS_OPEN: Final = 20
_WORDS: Final = ' class="words"'


def sentence(text: str) -> str:
    """`text` with a capital."""
    return text[:1].upper() + text[1:]


def section(title: str, *content: str) -> str:
    """A box with a heading; `content` is HTML, as is what the others return."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def facts(rows: Sequence[tuple[str, Any]]) -> str:
    """Figures and words, each under its name."""
    return (
        '<dl class="facts">'
        + "".join(
            f"<div><dt>{escape(name)}</dt>"
            f"<dd{'' if isinstance(value, int) else _WORDS}>{number(value)}</dd></div>"
            for name, value in rows
        )
        + "</dl>"
    )


def number(value: Any) -> str:
    """Whole numbers with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else escape(str(value))


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """`columns` are (heading, whether it holds words); the cells of `rows` are HTML."""
    styles = [_WORDS if words else "" for _, words in columns]
    head = "".join(
        f"<th{style}>{escape(name)}</th>" for (name, _), style in zip(columns, styles, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{style}>{cell}</td>" for cell, style in zip(row, styles, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def known(value: Any) -> str:
    """A value, or a dash for None."""
    return "–" if value is None else escape(str(value))


def long_text(text: str) -> str:
    """Text that may break in a narrow column."""
    return f'<span class="long">{escape(text)}</span>'


def legend(rows: Sequence[tuple[str, int, str]]) -> str:
    """(colour, count, what it stands for)."""
    return (
        '<ul class="legend">'
        + "".join(
            f'<li><i class="{style}"></i><b>{number(count)}</b><span>{escape(text)}</span></li>'
            for style, count, text in rows
        )
        + "</ul>"
    )


def note(text: str) -> str:
    """A remark below something else."""
    return f'<p class="quiet" style="margin-top:14px">{escape(sentence(text))}</p>'


def long_table(
    columns: Sequence[tuple[str, bool]],
    items: Sequence[Json],
    total: int,
    row: Callable[[Json], list[str]],
) -> list[str]:
    """A table whose first rows are open to see; `total` of which the JSON may have only some."""
    rows = [row(item) for item in items[:_ROWS_SHOWN]]
    parts = [table(columns, rows[:_ROWS_OPEN])]
    if rows[_ROWS_OPEN:]:
        summary = f"<summary>{len(rows) - _ROWS_OPEN} more</summary>"
        parts.append(f"<details>{summary}{table(columns, rows[_ROWS_OPEN:])}</details>")
    if total > len(rows):
        parts.append(f'<p class="quiet">{total - len(rows)} more are not shown here.</p>')
    return parts
