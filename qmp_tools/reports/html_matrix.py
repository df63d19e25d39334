"""The sections of a matrix' page: the grid with its notes, its axes, and what was lost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any, Final

from ..matrix.axes import NONE
from ..matrix.result import State
from . import html_elements as element
from .html_elements import Json
from .matrix_report import Grid, grid_of

_STYLES: Final = {
    State.CLEAN: "good",
    State.LOST: "bad",
    State.SLOW: "bad",
    State.SKIPPED: "plain",
    State.UNTESTED: "known",
}
_MEANINGS: Final = {
    State.CLEAN: "clean: every page equal and reported, and the guest went on correctly",
    State.LOST: "lost: pages differ or were never reported, and the cell names whose fault it is",
    State.SLOW: "slow: the downtime was longer than --max-downtime allows",
    State.SKIPPED: "skipped: a QEMU lacks what the cell needs, or has to refuse it",
    State.UNTESTED: "untested: no verdict was reached",
}


def sections(answer: Json) -> list[str]:
    """The sections, from the matrix' JSON."""
    grid = grid_of(answer)
    counts = [(_STYLES[it], answer["counts"][it], _MEANINGS[it]) for it in State]
    found = [element.section("The cells", element.legend(counts), _table(grid), _notes(grid))]
    axes = [(name, ", ".join(it or NONE for it in axis)) for name, axis in answer["axes"].items()]
    found.append(element.section("The axes", element.facts([*axes, *_sharpness(answer)])))
    lost = [cell for cell in answer["cells"] if cell["state"] == State.LOST]
    if lost:
        found.append(element.section("What was lost", *map(_lost, lost)))
    return found


def _table(grid: Grid) -> str:
    columns = [(name, True) for name in (*(grid.row_axes or [grid.title]), *grid.columns)]
    rows = [
        [*map(escape, row or [""]), *(_cell(cell, grid) for cell in cells)]
        for row, cells in zip(grid.rows, grid.cells, strict=True)
    ]
    return element.table(columns, rows)


def _cell(cell: Mapping[str, Any] | None, grid: Grid) -> str:
    if cell is None:
        return ""
    note = grid.note_of(cell)
    number = "" if note is None else f" <sup>{note}</sup>"
    style = _STYLES[State(cell["state"])]
    return f'<span class="cell"><i class="{style}"></i>{escape(cell["short"])}{number}</span>'


def _notes(grid: Grid) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in grid.notes)
    return f'<ol class="notes">{items}</ol>' if items else ""


def _sharpness(answer: Json) -> list[tuple[str, Any]]:
    certain = [cell["certain"] for cell in answer["cells"] if cell["certain"] is not None]
    if not certain:
        return []
    return [("pages certain to show a lost bit, in the bluntest cell", min(certain))]


def _lost(cell: Mapping[str, Any]) -> str:
    stories = "".join(f"<li>{escape(story)}</li>" for story in cell["stories"])
    return (
        f"<h3>{escape(cell['name'])}</h3><p>{escape(cell['message'])}</p>"
        + (f'<ul class="notes">{stories}</ul>' if stories else "")
        + f"<pre>{escape(shlex.join(cell['command']))}</pre>"
    )
