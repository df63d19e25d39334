"""``dmaproof dirty-rate``: how fast a running guest's RAM gets dirty, and by whom."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from ..arguments import positive
from ..migration.dirty_rate import MODES, DirtyRates, measure, to_json, to_text
from ..qemu.attachment import attach
from .arguments import add_timeout, describe, reads
from .interruption import run_interruptibly

_EXAMPLES: Final = """\
examples:
  dmaproof dirty-rate /run/qmp2.sock
  dmaproof dirty-rate /run/qmp2.sock --seconds 5 --mode dirty-bitmap --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Let QEMU measure its dirty rate, and read the devices' from the vhost log "
        "while a migration runs. The log is only read.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("socket", type=Path, help="a QMP socket of the running QEMU")
    parser.add_argument("--seconds", type=reads(positive), default=1, metavar="N")
    parser.add_argument(
        "--mode", choices=MODES, default=MODES[0], help="QEMU's measure (default: %(default)s)"
    )
    add_timeout(parser)
    parser.add_argument("--json", action="store_true", help="write JSON instead of text")


async def _measure(arguments: argparse.Namespace) -> DirtyRates:
    async with attach("QEMU", arguments.socket, timeout_s=arguments.timeout) as qemu:
        return await measure(qemu, arguments.mode, arguments.seconds)


def _run(arguments: argparse.Namespace) -> int:
    rates = run_interruptibly(_measure(arguments))
    print(json.dumps(to_json(rates), indent=2) if arguments.json else to_text(rates))
    return 0
