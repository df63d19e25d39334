"""What a proof inside L1 found, in a form that goes out as JSON."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dmaproof.errors import DmaproofError
from dmaproof.vfio.requests import VfioError


@dataclass(frozen=True)
class Outcome:
    """One row of the report."""

    group: str
    name: str
    passed: bool
    found: str
    figures: dict[str, Any] = field(default_factory=dict)


class ProofFailedError(Exception):
    """What was to be shown is not so."""


def require(holds: bool, found: str) -> None:
    """Fail the proof, with what was `found`, unless it `holds`."""
    if not holds:
        raise ProofFailedError(found)


Proof = Callable[[], tuple[str, dict[str, Any]]]
"""Returns what it found, in words and in figures.

Raises ProofFailedError where it is not so.
"""


Rule = Callable[[], str]
"""A proof without figures."""


def run(group: str, name: str, proof: Proof) -> Outcome:
    """Carry out one proof; an error of the kernel's is a failed proof too."""
    try:
        found, figures = proof()
    except (ProofFailedError, DmaproofError, OSError) as error:
        return Outcome(group, name, False, str(error))
    return Outcome(group, name, True, found, figures)


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
