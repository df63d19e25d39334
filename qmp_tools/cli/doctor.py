"""``dmaproof doctor``: what the machine has for a proof, what it lacks, and what mends it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..doctor import GUEST_MEMORY_BYTES, can_prove, examine, look
from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..host.finding import Finding, State
from ..reports.report import SCHEMA_VERSION
from .arguments import describe
from .display import print_text
from .outputs import write_json

_EXAMPLES = """\
Nothing is changed. 'limited' is what a proof can do without, 'missing' is what it cannot; the line
below each has what mends it.

examples:
  dmaproof doctor
  dmaproof doctor --guest bare            the guest that needs neither apt nor a static libc
  dmaproof doctor --json - | jq '.findings[] | select(.state == "missing") | .remedy'

exit codes:
  0  a proof can run
  2  wrong usage
  3  something is missing
"""

_SIGNS = {State.OK: "ok     ", State.LIMITED: "limited", State.MISSING: "MISSING"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Look at what this machine has for a proof, and say what mends what it lacks.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--guest",
        choices=sorted(GUEST_MEMORY_BYTES),
        default="linux",
        help="of the proof that is to run (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the findings as JSON; '-' for standard output"
    )


def _run(arguments: argparse.Namespace) -> int:
    findings = examine(look(), arguments.guest)
    exit_code = EXIT_PASS if can_prove(findings) else EXIT_UNTESTED
    if arguments.json != "-":
        print_text(to_text(findings, arguments.guest))
    if arguments.json:
        answer = {
            "schema_version": SCHEMA_VERSION,
            "kind": "doctor",
            "verdict": _sentence(findings, arguments.guest),
            "exit_code": exit_code,
            "findings": [asdict(finding) for finding in findings],
        }
        write_json(answer, arguments.json)
    return exit_code


def to_text(findings: list[Finding], guest: str) -> str:
    """A line for each finding, with its remedy below it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_SIGNS[finding.state]}  {finding.name:{width}}  {finding.what}")
        if finding.remedy:
            lines.append(f"{'':9}{'':{width}}  → {finding.remedy}")
    return "\n".join([*lines, "", _sentence(findings, guest)])


def _sentence(findings: list[Finding], guest: str) -> str:
    missing = [finding.name for finding in findings if finding.state == State.MISSING]
    if missing:
        return f"a proof with guest {guest} cannot run: {', '.join(missing)}"
    return f"a proof can run: dmaproof prove --guest {guest}"
