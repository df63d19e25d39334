"""``dmaproof passthrough``: the kernel's and QEMU's VFIO dirty tracking, without hardware."""

from __future__ import annotations

import argparse
import random
from typing import Final

from ..display import display
from ..host.qemu_choice import find_qemu
from ..l1.machine import l1
from ..passthrough import GROUPS
from ..passthrough.prove import Request, prove_passthrough, to_text
from .arguments import Subcommands, add_parser, seconds
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_EXAMPLES: Final = """\
examples:
  dmaproof passthrough                     all proofs; the machine is built the first time
  dmaproof passthrough --only migration
  dmaproof passthrough --quick --json - --quiet

exit codes:
  0  all proofs hold, and each planted fault was caught
  1  a proof does not hold
  2  wrong usage
  3  could not be tested; the message says why
"""


def add(commands: Subcommands) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        "passthrough",
        reporting_failure(_run, "passthrough"),
        summary="prove the kernel's and QEMU's VFIO dirty tracking, without hardware",
        description="Boot a machine with a VFIO device whose DMA is known, hold the kernel's dirty "
        "tracking against\nours in it, and migrate guests of QEMU's vfio-pci. The machine is built "
        "from the\ndistribution's archive the first time, which takes some minutes.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--qemu", metavar="PATH", help="runs the machine; default: the system's")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[], help="some of the proofs")
    parser.add_argument("--quick", action="store_true", help="fewer random cases")
    parser.add_argument("--seed", type=int, help="repeats a run's random choices")
    parser.add_argument("--timeout", type=seconds, default=1200.0, metavar="SECONDS")
    parser.add_argument("--keep", action="store_true", help="keep the run's folder and say where")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_outputs(parser, page=False)


def _run(arguments: argparse.Namespace) -> int:
    show = display(quiet=arguments.quiet)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(16)
    request = Request(
        seed, tuple(arguments.only), arguments.quick, arguments.timeout, arguments.keep
    )
    machine = l1(show.say)
    qemu = find_qemu(arguments.qemu)
    results = run_interruptibly(prove_passthrough(machine, qemu, request, show))
    if not writes_to_stdout(arguments):
        print(to_text(results))
    write_outputs(results, arguments)
    return int(results["exit_code"])
