"""The outcomes of ``dmaproof passthrough`` as KTAP version 1, the form of the kernel's own tests.

Each group of proofs is a test with its proofs as subtests. If several pairs of kernel and QEMU were
tested, each pair is a test with its groups as subtests. The format is described in the kernel's
Documentation/dev-tools/ktap.rst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_HEADER: Final = "KTAP version 1"
_INDENT: Final = "  "
_SKIPPED: Final = "lacking"
_HELD: Final = "holds"


@dataclass(frozen=True)
class _Test:
    name: str
    state: str
    message: str = ""
    subtests: Sequence[_Test] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return self.state in (_HELD, _SKIPPED)


def to_ktap(answer: Mapping[str, Any]) -> str:
    """Return a report of passthrough proofs as KTAP.

    A proof that could not be tested is 'not ok', because a CI must not take it for a pass. An
    unsupported one is skipped.
    """
    if answer["kind"] == "passthrough":
        tests = _groups(answer)
    elif answer["kind"] == "passthrough-matrix":
        tests = [
            _parent(f"kernel {run['kernel']}, QEMU {run['qemu']}", _groups(run))
            for run in answer["runs"]
        ]
    else:
        tests = [_Test("passthrough", "untested", answer["verdict"])]
    return "\n".join(_lines(tests)) + "\n"


def _groups(run: Mapping[str, Any]) -> list[_Test]:
    found: dict[str, list[_Test]] = {}
    for row in run["outcomes"]:
        proof = _Test(row["name"], row["state"], row["found"])
        found.setdefault(row["group"], []).append(proof)
    return [_parent(group, proofs) for group, proofs in found.items()]


def _parent(name: str, subtests: Sequence[_Test]) -> _Test:
    """Return a test that is skipped if all its subtests are, and passes if none of them fails."""
    if all(test.state == _SKIPPED for test in subtests):
        return _Test(name, _SKIPPED, f"no proof of {name} is supported", subtests)
    state = _HELD if all(test.is_ok for test in subtests) else "fails"
    return _Test(name, state, subtests=subtests)


def _lines(tests: Sequence[_Test]) -> list[str]:
    lines = [_HEADER, f"1..{len(tests)}"]
    for number, test in enumerate(tests, 1):
        if test.subtests:
            header, *rest = _lines(test.subtests)
            subtests = [header, f"# Subtest: {_description(test.name)}", *rest]
            lines += [f"{_INDENT}{line}" for line in subtests]
        result = f"{'ok' if test.is_ok else 'not ok'} {number} {_description(test.name)}"
        if test.state == _SKIPPED:
            result += f" # SKIP {' '.join(test.message.split())}"
        elif not test.is_ok:
            # A diagnostic line belongs to the next result line.
            lines += [f"# {line}" for line in test.message.splitlines()]
        lines.append(result)
    return lines


def _description(name: str) -> str:
    """Return a name without '#', which would begin a directive."""
    return " ".join(name.replace("#", "").split())
