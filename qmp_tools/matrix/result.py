"""What a cell of a matrix comes to, read from the report of its proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ..exit_codes import EXIT_LOST, EXIT_PASS

_STORIES: Final = 20


class State(StrEnum):
    """What is known of a cell."""

    CLEAN = "clean"
    LOST = "lost"
    SLOW = "slow"
    """No page was lost, but the downtime was longer than ``--max-downtime`` allows."""
    SKIPPED = "skipped"
    """A QEMU lacks what the cell needs, or has to refuse it; `Result.message` has its words."""
    UNTESTED = "untested"
    """It came to no verdict; `Result.message` says why."""


@dataclass(frozen=True)
class Result:
    """A cell's outcome. `message` is one of the verdict's or QEMU's sentences.

    `blame` has who lost pages (`verdict.Blame`), or 'unreported', 'late-bits', 'unlogged-ring' and
    'guest' where only the log or the guest found a fault; `stories` are those of the first lost
    pages. `certain` counts the pages of which any one's lost bit would have shown. `command` is the
    command line that repeats the proof. `kept` is a result of an earlier run.
    """

    state: State
    message: str
    blame: Sequence[str] = ()
    stories: Sequence[str] = ()
    qemu_versions: Sequence[str] = ()
    guaranteed_detectable: int | None = None
    seed: int | None = None
    seconds: float = 0.0
    command: Sequence[str] = ()
    kept: bool = False

    @property
    def short(self) -> str:
        """For a narrow column: 'clean', 'LOST: device'."""
        if self.state == State.LOST:
            return f"LOST: {', '.join(self.blame)}"
        return self.state.value


def untested(message: str) -> Result:
    """Of a cell that came to no verdict."""
    return Result(State.UNTESTED, message)


def skipped(message: str) -> Result:
    """Of a cell that a QEMU cannot have."""
    return Result(State.SKIPPED, message)


def result_of(report: Mapping[str, Any], seconds: float) -> Result:
    """What the JSON report of a proof says; it took `seconds`."""
    code = report["exit_code"]
    if code not in (EXIT_PASS, EXIT_LOST):
        message = report.get("reason", report["verdict"])
        return skipped(message) if report.get("unsupported") else untested(message)
    setup, sensitivity = report["setup"], report["sensitivity"]
    blame = _blame(report) if code == EXIT_LOST else []
    return Result(
        State.CLEAN if code == EXIT_PASS else State.LOST if blame else State.SLOW,
        report["verdict"],
        blame=blame,
        stories=[page["story"] for page in report["lost_pages"][:_STORIES]],
        qemu_versions=[setup["qemu_version"], setup["qemu_destination_version"]],
        guaranteed_detectable=sensitivity["guaranteed_detectable"],
        seed=setup["seed"],
        seconds=seconds,
    )


def _blame(report: Mapping[str, Any]) -> list[str]:
    losers = [name for name, pages in report["lost"].items() if pages]
    if losers:
        return losers
    log = report["log"] or {"late_bits": [], "unlogged_queues": []}
    found = {
        "unreported": report["sensitivity"]["unreported"],
        "late-bits": log["late_bits"],
        "unlogged-ring": log["unlogged_queues"],
        "guest": report["guest"]["errors"],
        "ring": report["wrong_rings"],
    }
    return [name for name, count in found.items() if count]
