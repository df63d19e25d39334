"""The reports that a subcommand writes besides its text: JSON, HTML, JUnit XML, TAP, KTAP.

All of them are made from the JSON. If a run could not be tested, the reports are written too and
give the reason. A CI that collects them then shows that reason, and not a missing file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UnsupportedError, UsageError
from dmaproof.system_errors import NO_ROOM

from ..exit_codes import EXIT_UNTESTED
from ..host.unexpected import untestable
from ..reports.junit_tap import to_junit, to_tap
from ..reports.ktap import to_ktap
from ..reports.report import SCHEMA_VERSION
from .streams import OutputError

Answer = dict[str, Any]


def _to_html(answer: Answer) -> str:
    from ..reports.html import to_html  # imported here, since most runs write no page

    return to_html(answer)


_PAGE: Final = "report"
_KTAP: Final = "ktap"
_FORMS: Final[dict[str, tuple[str, Callable[[Answer], str]]]] = {
    "json": ("the outcome as JSON", lambda answer: json.dumps(answer, indent=2) + "\n"),
    _PAGE: ("one self-contained HTML page", _to_html),
    "junit": ("JUnit XML", to_junit),
    "tap": ("TAP, the Test Anything Protocol", to_tap),
    _KTAP: ("KTAP, the form of the kernel's own tests", to_ktap),
}


def add_outputs(parser: argparse.ArgumentParser, *, page: bool = True, ktap: bool = False) -> None:
    """Add the options of the reports; the outcome may have no HTML `page`, and a form as `ktap`."""
    left_out = {*(() if page else (_PAGE,)), *(() if ktap else (_KTAP,))}
    group = parser.add_argument_group(
        "reports", "None is written by default. '-' as FILE stands for standard output."
    )
    for name, (what, _) in _FORMS.items():
        if name not in left_out:
            group.add_argument(f"--{name}", metavar="FILE", help=f"write {what}")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json`` alone, which writes `what`; `write_json` takes its value."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help=f"write {what} as JSON; '-' for standard output (default: no JSON is written)",
    )


def writes_to_stdout(arguments: argparse.Namespace) -> bool:
    """Return whether a report goes to standard output, which the text must then not."""
    return any(getattr(arguments, name, None) == "-" for name in _FORMS)


def write_outputs(answer: Answer, arguments: argparse.Namespace) -> None:
    """Write the reports that were asked for.

    Raises:
        UsageError: a file cannot be written.
        OutputError: the disk is full.
    """
    for name in _FORMS:
        if target := getattr(arguments, name, None):
            _write(name, answer, target)


def write_json(answer: Any, target: str) -> None:
    """Write `answer` to the file `target`, or for '-' to standard output.

    Raises:
        UsageError: the file cannot be written.
        OutputError: the disk is full.
    """
    _write("json", answer, target)


def _write(name: str, answer: Any, target: str) -> None:
    text = _FORMS[name][1](answer)
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        kind = OutputError if error.errno in NO_ROOM else UsageError
        raise kind(f"--{name} {target}: {error.strerror}") from error


def reporting_failure(
    run: Callable[[argparse.Namespace], int], kind: str
) -> Callable[[argparse.Namespace], int]:
    """Make a subcommand of this `kind` write its reports also when it raises an error."""

    def reporting(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except (UsageError, OutputError):
            raise
        except Exception as unexpected:
            error = untestable(unexpected)
            answer = {
                "schema_version": SCHEMA_VERSION,
                "kind": f"{kind}-untested",
                "verdict": f"could not be tested: {error}",
                "exit_code": EXIT_UNTESTED,
                "reason": str(error),
                "unsupported": isinstance(error, UnsupportedError),
                **_scenario_of(arguments),
            }
            write_outputs(answer, arguments)
            if error is unexpected:
                raise
            raise error from unexpected

    return reporting


def _scenario_of(arguments: argparse.Namespace) -> Answer:
    if "scenario" not in arguments:
        return {}
    from ..proof.options import ProofOptions

    return {"scenario": arguments.scenario or ProofOptions.scenario}
