"""What a proof inside L1 found, in a form that goes out as JSON."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from dmaproof.errors import DmaproofError, WaitTimeoutError
from dmaproof.vfio.requests import VfioError

from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..migration.migration import MigrationError
from ..proof.verdict import Verdict


class State(StrEnum):
    """What is known of a proof."""

    HOLDS = "holds"
    FAILS = "fails"
    LACKING = "lacking"
    """It could not be carried out: kernel or QEMU does not have what is to be proved."""
    UNTESTED = "untested"
    """The machine was too slow or too busy: every attempt was over before it told anything."""


NOT_HELD: Final = {
    State.FAILS: "FAILED",
    State.LACKING: "lacking",
    State.UNTESTED: "not tested",
}
"""What people are told of a proof that does not hold, or not yet."""


@dataclass(frozen=True)
class Outcome:
    """One row of the report."""

    group: str
    name: str
    state: State
    found: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """How long it took."""

    def to_json(self) -> dict[str, Any]:
        """All of it, and what `state` was told by before there was one."""
        passed, lacking = self.state is State.HOLDS, self.state is State.LACKING
        return {**asdict(self), "passed": passed, "lacking": lacking}


class ProofFailedError(Exception):
    """What was to be shown is not so."""


class NothingTestedError(ProofFailedError):
    """It was over before anything could have been lost: an attempt that tells nothing."""


class LackingError(Exception):
    """Kernel or QEMU does not have what is to be proved; the message is theirs."""


_UNKNOWN: Final = (errno.ENOTTY, errno.EOPNOTSUPP)
"""With these the kernel says that it does not know a request, or a device not its feature."""


def require(holds: bool, found: str) -> None:
    """Fail the proof, with what was `found`, unless it `holds`."""
    if not holds:
        raise ProofFailedError(found)


def require_pass(verdict: Verdict) -> None:
    """Fail the proof unless the verdict is a pass."""
    if verdict.exit_code != EXIT_UNTESTED:
        require(verdict.exit_code == EXIT_PASS, verdict.sentence)
    _require_test(verdict)


def require_loss(verdict: Verdict, told: str) -> None:
    """Fail the proof unless pages were lost by the fault that was injected."""
    if not verdict.lost:
        _require_test(verdict)
        raise ProofFailedError(f"the fault is not seen, {told}")


def _require_test(verdict: Verdict) -> None:
    """Fail the attempt if no page was certain to show a loss: on a starved machine a migration may
    be over before the guest has got to its write-once pages."""
    if not verdict.sensitivity.guaranteed_detectable:
        raise NothingTestedError(f"no page was certain to show a loss; {verdict.sentence}")


def observe(so: bool, found: str) -> None:
    """For what no kernel promises: where this one does not do so, that is no failure, but told."""
    if not so:
        raise LackingError(f"otherwise on this kernel: {found}")


Proof = Callable[[], tuple[str, dict[str, Any]]]
"""Returns what it found, in words and in figures.

Raises ProofFailedError where it is not so.
"""


_TRIES: Final = 3


def patient(proof: Proof) -> Proof:
    """`proof`, tried again where an attempt has told nothing, or its migration did not end.

    On a starved machine that happens. It is never hidden: each attempt is a line of L1's output,
    what was found says so, and the figure ``tries`` counts the attempts.
    """

    def carry_out() -> tuple[str, dict[str, Any]]:
        whys: list[str] = []
        while True:
            try:
                found, figures = proof()
            except (NothingTestedError, WaitTimeoutError, MigrationError) as error:
                whys.append(str(error))
                if len(whys) < _TRIES:
                    print(f"again\t{whys[-1].splitlines()[0]}", flush=True)
                    continue
                if isinstance(error, NothingTestedError | WaitTimeoutError):
                    raise NothingTestedError(f"tried {_TRIES} times: {'; '.join(whys)}") from error
                raise
            if whys:
                found += f"; at try {len(whys) + 1}, before that: {'; '.join(whys)}"
            return found, {**figures, "tries": len(whys) + 1}

    return carry_out


Rule = Callable[[], str]
"""A proof without figures."""


def run(group: str, name: str, proof: Proof) -> Outcome:
    """Carry out one proof; an error of the kernel's is a failed proof too, but for what it does not
    know. A wait that has reached its bound proves nothing."""
    began_s = time.monotonic()
    outcome = _carry_out(group, name, proof)
    return replace(outcome, seconds=round(time.monotonic() - began_s, 1))


def _carry_out(group: str, name: str, proof: Proof) -> Outcome:
    try:
        found, figures = proof()
    except LackingError as error:
        return Outcome(group, name, State.LACKING, str(error))
    except VfioError as error:
        state = State.LACKING if error.number in _UNKNOWN else State.FAILS
        return Outcome(group, name, state, str(error))
    except (NothingTestedError, WaitTimeoutError) as error:
        return Outcome(group, name, State.UNTESTED, str(error))
    except (ProofFailedError, DmaproofError, OSError) as error:
        return Outcome(group, name, State.FAILS, str(error))
    return Outcome(group, name, State.HOLDS, found, figures)


def errno_of(call: Callable[[], object]) -> int:
    """The errno with which the kernel refuses, 0 if it does not."""
    try:
        call()
    except VfioError as error:
        return error.number
    return 0


def refuses(expected: int, call: Callable[[], object]) -> str:
    """Fail the proof unless the kernel refuses with the errno `expected`; returns its name."""
    number = errno_of(call)
    name = errno.errorcode.get(number, "no error")
    require(number == expected, f"{name}, not {errno.errorcode[expected]}")
    return name
