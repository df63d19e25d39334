"""The result of a cell of a matrix, read from the report of its proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ..exit_codes import EXIT_LOST, EXIT_PASS

_STORIES: Final = 20


class State(StrEnum):
    """The state of a cell."""

    CLEAN = "clean"
    LOST = "lost"
    FAILED = "failed"
    """A passthrough proof does not hold; `Result.message` says what was found."""
    SLOW = "slow"
    """No page was lost, but the downtime was longer than ``--max-downtime`` allows."""
    SKIPPED = "skipped"
    """A QEMU does not support the cell or has to refuse it; `Result.message` has its message."""
    UNTESTED = "untested"
    """The proof did not reach a verdict; `Result.message` says why."""


@dataclass(frozen=True)
class Result:
    """The outcome of a cell.

    Attributes:
        message: the verdict, or an error message of QEMU or dmaproof.
        blame: the components that lost pages (`judgement.Blame`), or 'unreported', 'late-bits',
            'unlogged-ring', 'guest' or 'ring' if a fault was found without a lost page.
        stories: descriptions of the first lost pages.
        guaranteed_detectable: the number of pages on which a lost dirty bit would have been
            detected.
        seconds: the duration of the proof.
        command: the command line that repeats the proof.
        cached: whether the result comes from an earlier run.
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
    cached: bool = False

    @property
    def short(self) -> str:
        """A short form for a narrow column: 'clean', 'LOST: device'."""
        if self.state == State.LOST:
            return f"LOST: {', '.join(self.blame)}"
        return self.state.value


def untested(message: str) -> Result:
    """Return the result of a cell that did not reach a verdict."""
    return Result(State.UNTESTED, message)


def skipped(message: str) -> Result:
    """Return the result of a cell that a QEMU does not support."""
    return Result(State.SKIPPED, message)


def result_of(report: Mapping[str, Any], seconds: float) -> Result:
    """Return the result in the JSON report of a proof that took `seconds`."""
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
    culprits = [name for name, pages in report["lost"].items() if pages]
    if culprits:
        return culprits
    log = report["log"] or {"late_bits": [], "unlogged_queues": []}
    found = {
        "unreported": report["sensitivity"]["unreported"],
        "late-bits": log["late_bits"],
        "unlogged-ring": log["unlogged_queues"],
        "guest": report["guest"]["errors"],
        "ring": report["wrong_rings"],
    }
    return [name for name, count in found.items() if count]
