"""``dmaproof check``: compare all RAM of two paused QEMUs after a migration."""

from __future__ import annotations

import argparse

from dmaproof.errors import UsageError

from ..qemu.machine import DESTINATION, SOURCE
from ..ram_check.check import check
from ..ram_check.images import check_images
from ..reports.check_report import to_json, to_text
from .arguments import add_qemu, add_timeout, describe
from .display import print_text
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_EXAMPLES = """\
Both guests must still be paused after the migration. The source is; the destination is if it was
started with -S. dmaproof need not know how the QEMUs were started. It reads shared memory in place,
and copies private memory from the QEMU process in pieces. A snapshot ('dmaproof snapshot') takes
the place of a QEMU that has ended, or that is on another host.

examples:
  dmaproof check /run/source-qmp.sock /run/destination-qmp.sock
  dmaproof check source.sock destination.sock --report check.html --junit check.xml
  dmaproof check source.sock destination.sock --wait --resume
  dmaproof check source.snap destination.sock
  dmaproof check source.snap qemu:///system/vm
  dmaproof check one.sock other.sock --no-migration
  dmaproof check --raw source.mem destination.mem
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
    for side in (SOURCE, DESTINATION):
        add_qemu(parser, side, f"the {side} QEMU", or_snapshot=True)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--raw",
        action="store_true",
        help="compare two raw images of RAM, as Firecracker and cloud-hypervisor save them",
    )
    kind.add_argument(
        "--no-migration",
        action="store_true",
        help="compare any two paused QEMUs; without this option, QEMUs that have not migrated are "
        "not tested",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait until the sockets exist and the migration has completed, at most --timeout",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the guest of the destination after the comparison",
    )
    add_timeout(parser)
    add_outputs(parser)


def _run(arguments: argparse.Namespace) -> int:
    sides = arguments.source, arguments.destination
    if arguments.raw:
        if arguments.wait or arguments.resume:
            raise UsageError("--raw compares files, so --wait and --resume do not apply")
        outcome = run_interruptibly(check_images(*sides))
    else:
        outcome = run_interruptibly(
            check(
                *sides,
                expect_migration=not arguments.no_migration,
                wait=arguments.wait,
                resume=arguments.resume,
                timeout_s=arguments.timeout,
            )
        )
    if not writes_to_stdout(arguments):
        print_text(to_text(outcome))
    write_outputs(to_json(outcome), arguments)
    return outcome.exit_code
