"""What all findings have in common: a name, the program that has the defect, and a reproducer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from dmaproof.errors import UntestableError, UsageError

from ..host.timeout import DEFAULT_TIMEOUT_S


class Program(StrEnum):
    """The program that has a defect; the values are those of the JSON report."""

    LINUX = "linux"
    QEMU = "qemu"

    @property
    def proper_name(self) -> str:
        """The program's name, as people write it."""
        return {Program.LINUX: "Linux", Program.QEMU: "QEMU"}[self]


@dataclass(frozen=True)
class UnderTest:
    """The programs on which a finding is tried; None is dmaproof's default."""

    kernel: str | None = None
    """The version of a kernel as in ``dmaproof passthrough --kernel``."""
    kernel_source: Path | None = None
    """The source tree of the kernel."""
    kernel_patches: tuple[Path, ...] = ()
    """The patches on the default version of the kernel."""
    qemu: str | None = None
    """The version or the path of a QEMU as in ``dmaproof prove --qemu``."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """The bound of each wait."""
    keep: bool = False
    """Whether the run's folder is kept."""

    def options_of(self, program: Program) -> dict[str, str]:
        """Return the options that were given for `program`, by their names."""
        given = {
            Program.LINUX: {
                "--kernel": self.kernel or "",
                "--kernel-source": str(self.kernel_source or ""),
                "--kernel-patch": " ".join(map(str, self.kernel_patches)),
            },
            Program.QEMU: {"--qemu": self.qemu or ""},
        }
        return {name: value for name, value in given[program].items() if value}


class State(StrEnum):
    """The result of trying a finding; the values are those of the JSON report."""

    REPRODUCED = "reproduced"
    """The program has the defect."""
    NOT_REPRODUCED = "not-reproduced"
    """The program behaves correctly where the defect would have shown."""


@dataclass(frozen=True)
class Reproduction:
    """The outcome of trying a finding.

    Attributes:
        state: whether the program has the defect.
        found: what was seen, for people.
        tested: the program with its version, such as 'Linux 7.3.4'.
    """

    state: State
    found: str
    tested: str


@dataclass(frozen=True)
class Finding(ABC):
    """A defect of Linux or QEMU, and how to reproduce it.

    Attributes:
        name: the name on the command line.
        title: the defect in one line.
        affects: the versions that have the defect.
    """

    program: ClassVar[Program]
    """The program that has the defect."""

    name: str
    title: str
    affects: str

    @abstractmethod
    async def reproduce(self, under_test: UnderTest) -> Reproduction:
        """Try the finding.

        Raises:
            UntestableError: it cannot be tried; the message says why.
        """

    @classmethod
    async def try_all(cls, findings: Sequence[Self], under_test: UnderTest) -> list[Attempt]:
        """Try findings of this class, one after the other unless the class can do better."""
        return [
            Attempt(finding, await outcome_of(finding.reproduce(under_test)))
            for finding in findings
        ]

    def refuse_other_programs(self, under_test: UnderTest) -> None:
        """Refuse the options of a program that the finding is not about.

        Raises:
            UsageError: the message names the option.
        """
        for program in Program:
            for option, value in under_test.options_of(program).items():
                if program is not self.program:
                    raise UsageError(
                        f"{option} {value}: the finding {self.name} is about "
                        f"{self.program.proper_name}; leave out {option}"
                    )


@dataclass(frozen=True)
class Attempt:
    """A finding that was tried; an error instead of an outcome says why it is untested."""

    finding: Finding
    outcome: Reproduction | UntestableError

    def to_json(self) -> dict[str, Any]:
        """Return the attempt as in docs/report.schema.json."""
        tested = state = None
        if isinstance(self.outcome, Reproduction):
            tested, state = self.outcome.tested, self.outcome.state
        return {
            "name": self.finding.name,
            "program": self.finding.program,
            "title": self.finding.title,
            "state": state or "untested",
            "found": self.found,
            "tested": tested,
        }

    @property
    def found(self) -> str:
        """What was seen, or why the finding is untested."""
        return str(self.outcome) if isinstance(self.outcome, Exception) else self.outcome.found


async def outcome_of(trial: Awaitable[Reproduction]) -> Reproduction | UntestableError:
    """Return the outcome of a trial, or the error that says why it has none."""
    try:
        return await trial
    except UntestableError as error:
        return error


async def attempts(findings: Sequence[Finding], under_test: UnderTest) -> list[Attempt]:
    """Try the findings, those of one class together; return the attempts in the given order."""
    tried: dict[str, Attempt] = {}
    kinds: dict[type[Finding], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(type(finding), []).append(finding)
    for kind, of_kind in kinds.items():
        for attempt in await _tried(kind, of_kind, under_test):
            tried[attempt.finding.name] = attempt
    return [tried[finding.name] for finding in findings]


async def _tried(
    kind: type[Finding], findings: Sequence[Finding], under_test: UnderTest
) -> list[Attempt]:
    try:
        return await kind.try_all(findings, under_test)
    except UntestableError as error:
        return [Attempt(finding, error) for finding in findings]
