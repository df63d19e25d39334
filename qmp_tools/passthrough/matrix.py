"""Pairs of kernel and QEMU: what each pair tracks, as a table.

The table is made of the reports of `prove`, one for each pair. docs/passthrough.md shows it as it
is printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..reports.report import SCHEMA_VERSION
from .migrations import NAMES, UNTRACKED
from .outcome import NOT_HELD, State

Run = Mapping[str, Any]
"""The report of one pair."""

COLUMNS: Final = ("kernel", "QEMU", *NAMES, UNTRACKED, "other proofs")
_CONTROL: Final = ", control: drop"


def to_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the reports of all pairs, with a common verdict."""
    counts = Counter(run["exit_code"] for run in runs)
    failed, passed = counts[EXIT_LOST], counts[EXIT_PASS]
    pairs = f"{len(runs)} pairs of kernel and QEMU"
    verdict = f"{failed} of {pairs} fail" if failed else f"no proof fails on {pairs}"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "passthrough-matrix",
        "verdict": verdict,
        "exit_code": EXIT_LOST if failed else EXIT_PASS if passed else EXIT_UNTESTED,
        "runs": list(runs),
    }


class _Notes:
    """Numbered notes below the table, for text that does not fit in a cell."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def refer(self, text: str) -> str:
        """Return the reference to the note with this text."""
        line = " ".join(text.split())
        return f"[{self._numbers.setdefault(line, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for text, number in self._numbers.items()]


def table(runs: Sequence[Run]) -> str:
    """Return the table in Markdown, with its notes."""
    notes = _Notes()
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for run in runs:
        by_name = {
            outcome["name"]: outcome
            for outcome in run["outcomes"]
            if outcome["group"] == "migration"
        }
        cells = [_tracking(by_name, name, notes) for name in NAMES]
        cells += [_untracked(by_name, notes), _others(run)]
        lines.append(f"| {' | '.join((run['kernel'], run['qemu'], *cells))} |")
    return "\n".join([*lines, "", *notes.lines()])


def _tracking(by_name: Mapping[str, Run], name: str, notes: _Notes) -> str:
    outcome, control = by_name.get(name), by_name.get(name + _CONTROL)
    if outcome is None:
        return ""
    if outcome["state"] != State.HOLDS:
        return _not_held(outcome, notes)
    differing = f"{outcome['figures']['differing']} differ"
    if control is None:
        return differing
    if control["state"] != State.HOLDS:
        return f"{differing}; control {_not_held(control, notes)}"
    figures = control["figures"]
    return f"{differing}; control {figures['differing']} of {figures['kept_back']}"


def _untracked(by_name: Mapping[str, Run], notes: _Notes) -> str:
    outcome = by_name.get(UNTRACKED)
    if outcome is None:
        return ""
    if outcome["state"] != State.HOLDS:
        return _not_held(outcome, notes)
    return (
        f"{outcome['figures']['differing']} of {outcome['figures']['guaranteed_detectable']} stale"
    )


def _not_held(outcome: Run, notes: _Notes) -> str:
    return f"{NOT_HELD[outcome['state']]} {notes.refer(outcome['found'])}"


def _others(run: Run) -> str:
    others = [outcome for outcome in run["outcomes"] if outcome["group"] != "migration"]
    if not others:
        return ""
    counts = Counter(State(outcome["state"]) for outcome in others)
    text = f"{counts[State.HOLDS]} of {len(others)} hold"
    for state in (State.NOT_SUPPORTED, State.UNTESTED):
        if counts[state]:
            text += f", {counts[state]} {NOT_HELD[state]}"
    return text
