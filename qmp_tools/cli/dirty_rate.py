"""``dmaproof dirty-rate``: how fast vCPUs and devices dirty a running guest's RAM."""

from __future__ import annotations

import argparse
import json
from typing import Final

from ..arguments import positive
from ..migration.dirty_rate import MODES, DirtyRates, measure, to_json, to_text
from ..qemu.opening import open_qemu
from .arguments import add_qemu, add_timeout, describe, reads
from .interruption import run_interruptibly

_EXAMPLES: Final = """\
examples:
  dmaproof dirty-rate /run/qmp2.sock
  dmaproof dirty-rate qemu:///system/vm
  dmaproof dirty-rate /run/qmp2.sock --seconds 5 --mode dirty-bitmap --json

exit codes:
  0  the rates were printed
  2  wrong usage
  3  not measured: the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Measure how fast a guest's RAM gets dirty: QEMU measures what vCPUs write, "
        "and\ndmaproof reads what devices write from the vhost log while a migration runs.",
        epilog=_EXAMPLES,
    )
    add_qemu(parser, "qemu", "the running QEMU")
    parser.add_argument(
        "--seconds",
        type=reads(positive),
        default=1,
        metavar="N",
        help="how long to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="how QEMU measures, see calc-dirty-rate in its QMP reference (default: %(default)s)",
    )
    add_timeout(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


async def _measure(arguments: argparse.Namespace) -> DirtyRates:
    async with open_qemu("QEMU", arguments.qemu, timeout_s=arguments.timeout) as qemu:
        return await measure(qemu, arguments.mode, arguments.seconds)


def _run(arguments: argparse.Namespace) -> int:
    rates = run_interruptibly(_measure(arguments))
    print(json.dumps(to_json(rates), indent=2) if arguments.json else to_text(rates))
    return 0
