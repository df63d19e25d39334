"""The outcome of a proof in L1, in a form that can be written as JSON."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, Final

from dmaproof.errors import DmaproofError, WaitTimeoutError
from dmaproof.vfio.requests import VfioError

from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..migration.migration import MigrationError
from ..proof.verdict import Verdict


class State(StrEnum):
    """The result of a proof; the values are those of the JSON report."""

    HOLDS = "holds"
    FAILS = "fails"
    NOT_SUPPORTED = "lacking"
    """The kernel or QEMU does not have the feature, or an unspecified behaviour of it differs."""
    UNTESTED = "untested"
    """The machine was too busy: every attempt ended before a lost page could have been noticed."""


NOT_HELD: Final = {
    State.FAILS: "FAILED",
    State.NOT_SUPPORTED: "unsupported",
    State.UNTESTED: "not tested",
}
"""The text form of each state but HOLDS."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one proof."""

    group: str
    name: str
    state: State
    found: str
    figures: dict[str, Any] = field(default_factory=dict)
    corrected: bool = False
    """Whether the kernel behaves correctly where the proof describes a defect."""
    seconds: float = 0.0
    """The duration of the proof."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields, and `passed` and `lacking`, which are older than `state`."""
        passed, lacking = self.state is State.HOLDS, self.state is State.NOT_SUPPORTED
        return {**asdict(self), "passed": passed, "lacking": lacking}


class ProofFailedError(Exception):
    """The proof does not hold; the message says what was found instead."""


class NothingTestedError(ProofFailedError):
    """The attempt ended before a lost page could have been noticed, so it proves nothing."""


class NotSupportedError(Exception):
    """The kernel or QEMU does not have the feature; the message is that of the kernel or QEMU."""


class DefectAbsentError(NotSupportedError):
    """The kernel behaves correctly where the proof describes a defect."""


_UNKNOWN: Final = (errno.ENOTTY, errno.EOPNOTSUPP)
"""The errnos for a request that the kernel does not know, or a feature that the device lacks."""


def require(holds: bool, found: str) -> None:
    """Raise ProofFailedError with the message `found` unless `holds`."""
    if not holds:
        raise ProofFailedError(found)


def require_pass(verdict: Verdict) -> None:
    """Raise ProofFailedError unless the verdict is a pass."""
    if verdict.exit_code != EXIT_UNTESTED:
        require(verdict.exit_code == EXIT_PASS, verdict.sentence)
    _require_test(verdict)


def require_loss(verdict: Verdict, summary: str) -> None:
    """Raise ProofFailedError unless the injected fault lost pages."""
    if not verdict.lost:
        _require_test(verdict)
        raise ProofFailedError(f"the injected fault was not noticed, {summary}")


def _require_test(verdict: Verdict) -> None:
    """Raise NothingTestedError if no page was guaranteed detectable.

    On a busy machine a migration may end before the guest reaches its write-once pages.
    """
    if not verdict.sensitivity.guaranteed_detectable:
        raise NothingTestedError(f"no page was guaranteed detectable; {verdict.sentence}")


def observe(as_known: bool, found: str) -> None:
    """Raise NotSupportedError unless the kernel behaves `as_known`.

    This is for behaviour that the kernel does not specify, so a difference is not a failure.
    """
    if not as_known:
        raise NotSupportedError(f"this kernel behaves differently: {found}")


def require_defect(present: bool, corrected: bool, found: str) -> None:
    """Raise an error unless a defect that a rule describes is `present`.

    Args:
        present: whether the kernel behaves as with the defect.
        corrected: whether it behaves correctly; then its difference is not a failure.
        found: what the kernel does.

    Raises:
        DefectAbsentError: the kernel behaves correctly.
        ProofFailedError: the kernel does neither.
    """
    if corrected:
        raise DefectAbsentError(f"this kernel behaves differently: {found}")
    require(present, f"neither the known defect nor correct: {found}")


Proof = Callable[[], tuple[str, dict[str, Any]]]
"""A proof returns what it found, as text and as figures, or raises ProofFailedError."""


_TRIES: Final = 3


def retrying(proof: Proof) -> Proof:
    """Return `proof` with up to two retries after attempts that tested nothing or did not end.

    Such attempts happen on a busy machine. They are never hidden: L1 prints a line for each one,
    the text of the outcome names their reasons, and the figure ``tries`` counts all attempts.
    """

    def carry_out() -> tuple[str, dict[str, Any]]:
        reasons: list[str] = []
        while True:
            try:
                found, figures = proof()
            except (NothingTestedError, WaitTimeoutError, MigrationError) as error:
                reasons.append(str(error))
                if len(reasons) < _TRIES:
                    print(f"retry\t{reasons[-1].splitlines()[0]}", flush=True)
                    continue
                if isinstance(error, NothingTestedError | WaitTimeoutError):
                    raise NothingTestedError(
                        f"{_TRIES} attempts failed: {'; '.join(reasons)}"
                    ) from error
                raise
            if reasons:
                found += f"; attempt {len(reasons) + 1}, after failed ones: {'; '.join(reasons)}"
            return found, {**figures, "tries": len(reasons) + 1}

    return carry_out


def repeated(control: Callable[[int], tuple[str, dict[str, Any]]], seed: int, rounds: int) -> Proof:
    """Return a proof that carries out a control `rounds` times, each time with another seed."""

    def carry_out() -> tuple[str, dict[str, Any]]:
        attempts = [retrying(partial(control, seed + number))() for number in range(rounds)]
        found, figures = attempts[0]
        if rounds > 1:
            found = f"caught {rounds} of {rounds}; the first: {found}"
        tries = sum(figures["tries"] for _, figures in attempts)
        return found, {**figures, "rounds": rounds, "tries": tries}

    return carry_out


Rule = Callable[[], str]
"""A check that returns what it found as text: a proof without figures."""


def run(group: str, name: str, proof: Proof) -> Outcome:
    """Carry out one proof and return its outcome; no error of the proof is raised.

    An error of the kernel fails the proof, unless the kernel does not know the request. After a
    timeout the proof is untested.
    """
    began_s = time.monotonic()
    outcome = _carry_out(group, name, proof)
    return replace(outcome, seconds=round(time.monotonic() - began_s, 1))


def _carry_out(group: str, name: str, proof: Proof) -> Outcome:
    try:
        found, figures = proof()
    except DefectAbsentError as error:
        return Outcome(group, name, State.NOT_SUPPORTED, str(error), corrected=True)
    except NotSupportedError as error:
        return Outcome(group, name, State.NOT_SUPPORTED, str(error))
    except VfioError as error:
        state = State.NOT_SUPPORTED if error.number in _UNKNOWN else State.FAILS
        return Outcome(group, name, state, str(error))
    except (NothingTestedError, WaitTimeoutError) as error:
        return Outcome(group, name, State.UNTESTED, str(error))
    except (ProofFailedError, DmaproofError, OSError) as error:
        return Outcome(group, name, State.FAILS, str(error))
    return Outcome(group, name, State.HOLDS, found, figures)


def errno_of(call: Callable[[], object]) -> int:
    """Return the errno with which the kernel refuses, or 0 if it does not refuse."""
    try:
        call()
    except VfioError as error:
        return error.number
    return 0


def refuses(expected: int, call: Callable[[], object]) -> str:
    """Return the name of `expected`; fail the proof if the kernel does not refuse with it."""
    number = errno_of(call)
    name = errno.errorcode.get(number, "no error")
    require(number == expected, f"expected {errno.errorcode[expected]}, got {name}")
    return name
