"""Read what a test program of the kernel reports: TAP 13, or KTAP version 1.

The program prints a plan, '1..N', and a result line for each of its N tests, 'ok NUMBER NAME' or
'not ok NUMBER NAME'. The output of the tests themselves is mixed into these lines. A test may even
print a line that looks like a result. So the last line with a number counts, because the program
prints a test's result after the test has ended; and lines with other numbers are a test's output.
Indented results are those of subtests, which the kernel's parsers count with their parent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

_PLAN: Final = re.compile(r"1\.\.(\d{1,9})\b")
_RESULT: Final = re.compile(r"(?P<indent> *)(?P<not>not )?ok (?P<number>\d{1,9})(?P<rest>(?: .*)?)")
_DIRECTIVE: Final = re.compile(r"(?:^|\s)# (SKIP|XFAIL|XPASS|error|TIMEOUT)\b.*", re.IGNORECASE)
_BEGINS: Final = re.compile(r"# {1,2}RUN +(\S+) \.\.\.")
_SEPARATOR: Final = re.compile(r"^(?:- )?|(?: # .*)$")


class Result(Enum):
    """The result of one test."""

    PASSED = auto()
    SKIPPED = auto()
    FAILED = auto()


@dataclass(frozen=True)
class KtapResults:
    """The results of one program, by the names of its tests."""

    planned: int | None
    """The number of tests that the program announced; None if it printed no plan."""
    results: tuple[tuple[str, Result], ...]
    last: str | None
    """The test that was the last to begin or to end."""

    def names(self, result: Result) -> list[str]:
        """Return the names of the tests with this result."""
        return [name for name, found in self.results if found is result]

    @property
    def is_complete(self) -> bool:
        """Whether each planned test has a result."""
        return self.planned == len(self.results)


def read_ktap(output: str) -> KtapResults:
    """Read the whole output of a test program, which may end at any place."""
    planned: int | None = None
    last: str | None = None
    found: dict[int, tuple[str, Result]] = {}
    subtests: list[str] = []
    for line in _whole_lines(output):
        if planned is None:
            if plan := _PLAN.match(line):
                planned = int(plan[1])
            continue
        if begun := _BEGINS.match(line):
            last = begun[1]
        result = _RESULT.fullmatch(line)
        if result is None:
            continue
        name, state = _read_result(result)
        if result["indent"]:
            if state is Result.FAILED:
                subtests.append(name)
            continue
        number = int(result["number"])
        if 1 <= number <= planned:
            last = name
            names = ", ".join(subtests)
            if state is Result.FAILED and names:
                name = f"{name} ({names})"
            found[number] = (name, state)
            subtests = []
    return KtapResults(planned, tuple(found[number] for number in sorted(found)), last)


def _whole_lines(output: str) -> Iterator[str]:
    """Yield the lines that end with a newline; a program that was killed may leave half a line."""
    *lines, _ = output.split("\n")
    yield from lines


def _read_result(result: re.Match[str]) -> tuple[str, Result]:
    directive = _DIRECTIVE.search(result["rest"])
    if result["not"]:
        state = Result.FAILED
    elif directive and directive[1].upper() == "SKIP":
        state = Result.SKIPPED
    else:
        state = Result.PASSED
    name = _DIRECTIVE.sub("", result["rest"]).strip()
    if not name and directive:  # kselftest.h has the name after the directive
        name = directive[0].strip().removeprefix("# ")[len(directive[1]) :].strip()
    return _SEPARATOR.sub("", name).strip() or f"test {result['number']}", state
