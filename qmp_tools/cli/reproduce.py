"""``dmaproof reproduce``: try the known defects of Linux and QEMU on a kernel or a QEMU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UsageError

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..findings import FINDINGS, find_finding
from ..findings.finding import Attempt, Reproduction, State, UnderTest, attempts
from ..passthrough.l1.kernel import DEFAULT_KERNEL, KERNELS
from ..passthrough.l1.stock import STOCK
from ..reports.report import SCHEMA_VERSION
from .arguments import add_keep, add_quiet, add_timeout, describe
from .display import print_table, print_text
from .interruption import run_interruptibly
from .outputs import add_json, write_json

_EXAMPLES: Final = """\
examples:
  dmaproof reproduce --list                   # the findings
  dmaproof reproduce iova-bitmap-overrun      # on the default kernel
  dmaproof reproduce iova-bitmap-overrun --kernel stock
  dmaproof reproduce hwpt-hole --kernel-patch fix.patch
  dmaproof reproduce hwpt-hole iova-bitmap-lost-fault --json -

exit codes:
  0  not reproduced: the program behaves correctly where the defect would have shown
  1  reproduced: the program has the defect
  2  wrong usage
  3  not tested: the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Try known defects of Linux and QEMU on a kernel or a QEMU.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("names", nargs="*", metavar="FINDING", help="the findings to try")
    parser.add_argument(
        "--list", action="store_true", dest="lists", help="print all findings, and try none"
    )
    add_kernel(parser)
    parser.add_argument(
        "--qemu",
        metavar="VERSION|PATH",
        help="QEMU to test (default: the system's, or that of the finding)",
    )
    add_timeout(parser)
    add_keep(parser)
    add_quiet(parser)
    add_json(parser, "the outcomes, or with --list the findings,")


def add_kernel(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the kernel; only one of them may be given."""
    kernel = parser.add_mutually_exclusive_group()
    kernel.add_argument(
        "--kernel",
        choices=(*KERNELS, STOCK),
        help=f"kernel to test; '{STOCK}': Debian's own (default: {DEFAULT_KERNEL})",
    )
    kernel.add_argument(
        "--kernel-source",
        type=Path,
        metavar="DIR",
        help="test the kernel of this source tree, which is not modified",
    )
    kernel.add_argument(
        "--kernel-patch",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help=f"test Linux {DEFAULT_KERNEL} with these patches, which patch -p1 applies",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.lists == bool(arguments.names):
        raise UsageError(
            "reproduce needs the name of a finding, or --list alone; 'dmaproof reproduce --list' "
            "prints the names"
        )
    if arguments.lists:
        _list(arguments.json)
        return EXIT_PASS
    findings = [find_finding(name) for name in arguments.names]
    under_test = UnderTest(
        kernel=arguments.kernel,
        kernel_source=arguments.kernel_source,
        kernel_patches=tuple(arguments.kernel_patch),
        qemu=arguments.qemu,
        timeout_s=arguments.timeout,
        keep=arguments.keep,
    )
    for finding in findings:
        finding.refuse_other_programs(under_test)
    tried = run_interruptibly(attempts(list(dict.fromkeys(findings)), under_test))
    answer = to_json(tried)
    if arguments.json != "-":
        print_text(to_text(answer))
    if arguments.json:
        write_json(answer, arguments.json)
    return int(answer["exit_code"])


def _list(target: str | None) -> None:
    entries = [
        {
            "finding": finding.name,
            "program": str(finding.program),
            "affects": finding.affects,
            "title": finding.title,
        }
        for finding in FINDINGS.values()
    ]
    if target != "-":
        print_table(list(entries[0]), [list(entry.values()) for entry in entries])
    if target:
        write_json({"schema_version": SCHEMA_VERSION, "entries": entries}, target)


def to_json(tried: Sequence[Attempt]) -> dict[str, Any]:
    """Return the report of findings that were tried, as docs/report.schema.json describes it."""
    outcomes = [each.outcome for each in tried if isinstance(each.outcome, Reproduction)]
    reproduced = sum(outcome.state is State.REPRODUCED for outcome in outcomes)
    untested = len(tried) - len(outcomes)
    code = EXIT_LOST if reproduced else EXIT_UNTESTED if untested else EXIT_PASS
    verdict = f"{reproduced} of {len(tried)} findings reproduced"
    if untested:
        verdict += f", {untested} not tested"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "reproduce",
        "verdict": verdict,
        "exit_code": code,
        "findings": [each.to_json() for each in tried],
    }


_HEADINGS: Final = {
    State.REPRODUCED: "REPRODUCED",
    State.NOT_REPRODUCED: "NOT REPRODUCED",
    "untested": "NOT TESTED",
}


def to_text(answer: dict[str, Any]) -> str:
    """Return the report as text: a paragraph for each finding."""
    lines = []
    for finding in answer["findings"]:
        where = f" ({finding['tested']})" if finding["tested"] else ""
        lines.append(f"{_HEADINGS[finding['state']]}: {finding['name']}{where}: {finding['title']}")
        lines += [f"  {line}" for line in finding["found"].splitlines()]
    return "\n".join(lines)
