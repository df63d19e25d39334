"""``dmaproof check``: compare all RAM of two paused QEMUs after a migration."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..ram_check.check import check
from ..reports.check_report import to_json, to_text
from .arguments import add_timeout, describe
from .display import print_text
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_EXAMPLES = """\
Both guests must still be paused after the migration. The source is; the destination is if it was
started with -S. dmaproof need not know how the QEMUs were started. It reads shared memory in place,
and copies private memory from the QEMU process in pieces.

examples:
  dmaproof check /run/source-qmp.sock /run/destination-qmp.sock
  dmaproof check source.sock destination.sock --report check.html --junit check.xml
  dmaproof check one.sock other.sock --no-migration
  dmaproof check source.sock destination.sock --json - | jq '.differences[].gpa'

exit codes:
  0  pass: every page is equal, except reported pages that are known to differ or that the guest
     gave back to QEMU
  1  fail: pages differ
  2  wrong usage
  3  not tested: the RAM could not be compared, or pages may be either lost or given back; the
     message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "check"),
        description="Compare all RAM of two paused QEMUs after a migration, page by page.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("source", type=Path, help="QMP socket of the source QEMU")
    parser.add_argument("destination", type=Path, help="QMP socket of the destination QEMU")
    parser.add_argument(
        "--no-migration",
        action="store_true",
        help="compare any two paused QEMUs; without this option, QEMUs that have not migrated are "
        "not tested",
    )
    add_timeout(parser)
    add_outputs(parser)


def _run(arguments: argparse.Namespace) -> int:
    outcome = run_interruptibly(
        check(
            arguments.source,
            arguments.destination,
            expect_migration=not arguments.no_migration,
            timeout_s=arguments.timeout,
        )
    )
    if not writes_to_stdout(arguments):
        print_text(to_text(outcome))
    write_outputs(to_json(outcome), arguments)
    return outcome.exit_code
