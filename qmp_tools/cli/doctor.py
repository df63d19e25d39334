"""``dmaproof doctor``: missing prerequisites of a proof and how to fix them."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..arch import ARCHITECTURES, find_architecture
from ..doctor import GUEST_MEMORY_BYTES, can_prove, examine, gather_facts
from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..host.finding import Finding, State
from ..reports.report import SCHEMA_VERSION
from .arguments import describe
from .display import print_text
from .outputs import add_json, write_json

_EXAMPLES = """\
The machine is not changed. A proof can run without what is 'limited', and cannot run without what
is 'MISSING'. The line below each finding says how to fix it.

examples:
  dmaproof doctor
  dmaproof doctor --guest bare    # this guest needs neither a kernel nor a static libc
  dmaproof doctor --arch aarch64  # what a proof with an arm64 guest needs
  dmaproof doctor --json - | jq '.findings[] | select(.state == "missing") | .remedy'

exit codes:
  0  a proof can run
  2  wrong usage
  3  a prerequisite is missing
"""

_SIGNS = {State.OK: "ok     ", State.LIMITED: "limited", State.MISSING: "MISSING"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Print missing prerequisites of a proof and how to fix them.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--guest",
        choices=sorted(GUEST_MEMORY_BYTES),
        default="linux",
        help="guest of the proof that is to run (default: %(default)s)",
    )
    parser.add_argument(
        "--arch",
        choices=sorted(ARCHITECTURES),
        help="architecture of the guest (default: this machine's)",
    )
    add_json(parser, "the findings")


def _run(arguments: argparse.Namespace) -> int:
    architecture = find_architecture(arguments.arch)
    architecture.require_guest(arguments.guest)
    findings = examine(gather_facts(architecture), arguments.guest)
    proof = f"--guest {arguments.guest}"
    if arguments.arch is not None:
        proof += f" --arch {arguments.arch}"
    if architecture.devices:
        proof += f" --device {architecture.devices[0]}"
    exit_code = EXIT_PASS if can_prove(findings) else EXIT_UNTESTED
    if arguments.json != "-":
        print_text(to_text(findings, proof))
    if arguments.json:
        answer = {
            "schema_version": SCHEMA_VERSION,
            "kind": "doctor",
            "verdict": _sentence(findings, proof),
            "exit_code": exit_code,
            "findings": [asdict(finding) for finding in findings],
        }
        write_json(answer, arguments.json)
    return exit_code


def to_text(findings: list[Finding], proof: str) -> str:
    """Return a line for each finding, with its remedy below it.

    Args:
        findings: what the doctor has found.
        proof: the options of the proof for which it has looked, such as '--guest bare'.
    """
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_SIGNS[finding.state]}  {finding.name:{width}}  {finding.what}")
        if finding.remedy:
            lines.append(f"{'':9}{'':{width}}  → {finding.remedy}")
    return "\n".join([*lines, "", _sentence(findings, proof)])


def _sentence(findings: list[Finding], proof: str) -> str:
    missing = [finding.name for finding in findings if finding.state == State.MISSING]
    if missing:
        return f"a proof with {proof} cannot run: {', '.join(missing)}"
    return f"a proof can run: dmaproof prove {proof}"
