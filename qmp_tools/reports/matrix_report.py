"""A matrix as JSON for programs, and as a table with numbered notes for people.

The columns of the table are the pairs of QEMUs if there are several, and else the values of the
last axis that varies. Its rows are the combinations of the other axes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..matrix.axes import NONE, Matrix
from ..matrix.cells import Cell
from ..matrix.result import Result, State
from .report import HEADINGS, SCHEMA_VERSION

_QEMU: Final = "qemu"
_DESTINATION: Final = "qemu-destination"


def to_json(matrix: Matrix, results: Sequence[Result]) -> dict[str, Any]:
    """Return all findings of a matrix; `results` are in the order of its cells."""
    counts = {state.value: sum(result.state == state for result in results) for state in State}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "matrix",
        "verdict": _sentence(counts, len(results)),
        "exit_code": _exit_code(counts),
        "counts": counts,
        "axes": {name: list(values) for name, values in matrix.axes.items()},
        "cells": [
            {
                "name": matrix.label(cell),
                "options": dict(cell),
                **asdict(result),
                "short": result.short,
            }
            for cell, result in zip(matrix.cells(), results, strict=True)
        ],
    }


def _exit_code(counts: Mapping[str, int]) -> int:
    """Return the exit code: a failure outweighs an untested cell, and only a verdict can pass."""
    if counts[State.LOST] or counts[State.FAILED] or counts[State.SLOW]:
        return EXIT_LOST
    return EXIT_UNTESTED if counts[State.UNTESTED] or not counts[State.CLEAN] else EXIT_PASS


def _sentence(counts: Mapping[str, int], total: int) -> str:
    shares = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{total} cells: {shares}"


@dataclass(frozen=True)
class Grid:
    """A matrix in two dimensions. `cells[row][column]` is None if that cell was excluded.

    `row_axes` are the names of the axes whose values label a row. `title` names the columns' axis.
    """

    title: str
    columns: Sequence[str]
    row_axes: Sequence[str]
    rows: Sequence[Sequence[str]]
    cells: Sequence[Sequence[Mapping[str, Any] | None]]
    notes: Sequence[str]
    """The messages of the cells that are not clean, each text once; `note_of` has its number."""

    def note_of(self, cell: Mapping[str, Any]) -> int | None:
        """Return the number, from 1 on, of the note to `cell`; None if the cell is clean."""
        return None if cell["state"] == State.CLEAN else self.notes.index(cell["message"]) + 1


def grid_of(answer: Mapping[str, Any]) -> Grid:
    """Return the grid of a matrix's JSON."""
    varying = [name for name, values in answer["axes"].items() if len(values) > 1]
    across = [name for name in varying if name in (_QEMU, _DESTINATION)] or varying[-1:]
    down = [name for name in varying if name not in across]
    found: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    columns: dict[str, None] = {}
    for cell in answer["cells"]:
        options: Cell = cell["options"]
        column = _column(options, across)
        columns[column] = None
        found.setdefault(tuple(options.get(name, NONE) for name in down), {})[column] = cell
    messages = [cell["message"] for cell in answer["cells"] if cell["state"] != State.CLEAN]
    return Grid(
        title="QEMU" if _QEMU in across or _DESTINATION in across else "".join(across),
        columns=list(columns),
        row_axes=down,
        rows=list(found),
        cells=[[row.get(column) for column in columns] for row in found.values()],
        notes=list(dict.fromkeys(messages)),
    )


def _column(options: Cell, across: Sequence[str]) -> str:
    if across and across[0] in (_QEMU, _DESTINATION):
        source = options.get(_QEMU, "system")
        return f"{source} → {options.get(_DESTINATION, source)}"
    return " ".join(options.get(name, NONE) for name in across) or "result"


def to_text(answer: Mapping[str, Any]) -> str:
    """Return the verdict, the table, and its notes."""
    grid = grid_of(answer)
    lines = [[*(grid.row_axes or [grid.title]), *grid.columns]]
    lines += [
        [*(row or [""]), *(_cell_text(cell, grid) for cell in cells)]
        for row, cells in zip(grid.rows, grid.cells, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    notes = [f"[{number}] {_indented(note)}" for number, note in enumerate(grid.notes, 1)]
    text = [f"{HEADINGS[answer['exit_code']]}: {answer['verdict']}", "", *table]
    text += ["", *notes] if notes else []
    lost = next((cell for cell in answer["cells"] if cell["state"] == State.LOST), None)
    if lost is not None:
        text += ["", f"to repeat the first loss: {shlex.join(lost['command'])}"]
        text += [f"  {story}" for story in lost["stories"][:3]]
    return "\n".join(text)


def _cell_text(cell: Mapping[str, Any] | None, grid: Grid) -> str:
    if cell is None:
        return ""
    note = grid.note_of(cell)
    return cell["short"] if note is None else f"{cell['short']} [{note}]"


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")
