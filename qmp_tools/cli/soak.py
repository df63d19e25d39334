"""``dmaproof soak``: migrate one guest many times, and look for lost pages and leaks."""

from __future__ import annotations

import argparse
from typing import Final

from ..arguments import positive
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..proof.soak import Soak, soak
from ..reports.soak_report import GROWTH_HEADINGS, growth_rows, soak_to_json, soak_to_text
from .arguments import add_quiet, describe, reads
from .display import print_table, print_text
from .interruption import run_interruptibly
from .log import OfManyProofs
from .options import add_options, given_options
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_EXAMPLES: Final = """\
examples:
  dmaproof soak    # 200 migrations; takes some minutes
  dmaproof soak --migrations 20 --scenario multifd-4 --guest linux
  dmaproof soak --json - | jq .growth

exit codes:
  0  pass: every page was equal each time, and neither the tool nor the device grew
  1  fail: pages were lost or not reported dirty, the guest found errors, or something grew
  2  wrong usage
  3  not tested: the message says why
"""

_DEFAULTS: Final = ProofOptions(guest="bare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "soak"),
        description="Migrate one guest back and forth many times, each time to a new QEMU, compare "
        "every page\neach time, and check whether the tool or the device leaks memory, file "
        "descriptors or shared\nmemory.",
        epilog=_EXAMPLES,
        usage="[OPTION]...",
    )
    parser.add_argument(
        "--migrations",
        type=reads(positive),
        default=200,
        metavar="N",
        help="how often to migrate (default: %(default)s)",
    )
    add_options(parser, defaults=_DEFAULTS)
    add_quiet(parser)
    add_outputs(parser, page=False)


async def _soak(arguments: argparse.Namespace) -> Soak:
    options = given_options(arguments, _DEFAULTS)
    return await soak(await resolve(options), arguments.migrations)


def _run(arguments: argparse.Namespace) -> int:
    arguments.log.addFilter(OfManyProofs())
    outcome = run_interruptibly(_soak(arguments))
    if not writes_to_stdout(arguments):
        print_text(f"{soak_to_text(outcome)}\n")
        print_table(GROWTH_HEADINGS, growth_rows(outcome.growths))
    write_outputs(soak_to_json(outcome), arguments)
    return outcome.exit_code
