"""``dmaproof passthrough``: VFIO dirty tracking of the kernel and of QEMU, without hardware."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Final

from ..arch.x86_64 import X86_64
from ..arguments import positive
from ..passthrough.catalog import GROUPS, Request, select
from ..passthrough.l1.kernel import DEFAULT_KERNEL, KERNELS
from ..passthrough.l1.machine import l1
from ..passthrough.l1.stock import STOCK
from ..passthrough.prove import prove_passthrough, to_text
from ..proof.resolve import chosen_seed
from ..qemu.builds import build_folder
from ..qemu.choice import find_qemu
from .arguments import add_keep, add_quiet, add_timeout, describe, reads
from .display import print_text
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_EXAMPLES: Final = """\
examples:
  dmaproof passthrough    # all proofs; the first run builds the machine
  dmaproof passthrough --only migration
  dmaproof passthrough --quick --json - --quiet
  dmaproof passthrough --only 'rules: HWPT*' --kernel stock --qemu 10.0
  dmaproof matrix --passthrough all --l1-kernel 7.3,stock --qemu 10.0,11.1    # a table

exit codes:
  0  pass: all proofs passed, and each injected fault was caught
  1  fail: a proof failed
  2  wrong usage
  3  not tested: a proof could not be carried out, for instance on a busy machine; the message says
     why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "passthrough"),
        description="Boot a machine with a VFIO device whose DMA is known, compare the dirty "
        "tracking of the kernel\nwith dmaproof's in it, and migrate guests with QEMU's vfio-pci. "
        "The first run builds the\nmachine from the distribution's archive, which takes some "
        "minutes.",
        epilog=_EXAMPLES,
        usage="[OPTION]...",
    )
    parser.add_argument(
        "--kernel",
        choices=(*KERNELS, STOCK),
        default=DEFAULT_KERNEL,
        help=f"kernel of the machine; '{STOCK}': Debian's own (default: %(default)s)",
    )
    parser.add_argument(
        "--qemu",
        metavar="VERSION",
        help="fetched QEMU to test (default: the QEMU of the machine's distribution)",
    )
    parser.add_argument(
        "--machine-qemu",
        metavar="PATH",
        help="the QEMU that runs the machine (default: the system's)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"proofs to carry out: groups ({', '.join(GROUPS)}), names, or patterns of names "
        "(default: all)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="try fewer random cases and injected faults"
    )
    parser.add_argument(
        "--controls",
        type=reads(positive),
        default=1,
        metavar="N",
        help="how often to inject each fault in a migration (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of an earlier run, to repeat its random choices (default: random)",
    )
    add_timeout(parser)
    add_keep(parser)
    add_quiet(parser)
    add_outputs(parser, page=False)


def _run(arguments: argparse.Namespace) -> int:
    request = Request(
        seed=chosen_seed(arguments.seed, bits=16),
        only=select(arguments.only, quick=arguments.quick),
        quick=arguments.quick,
        controls=arguments.controls,
        timeout_s=arguments.timeout,
    )
    tested = build_folder(arguments.qemu, X86_64) if arguments.qemu else None
    machine_qemu = find_qemu(arguments.machine_qemu, X86_64)
    machine = replace(l1(arguments.kernel), qemu=tested)
    work = prove_passthrough(machine, machine_qemu, request, keep=arguments.keep)
    results = run_interruptibly(work)
    if not writes_to_stdout(arguments):
        print_text(to_text(results))
    write_outputs(results, arguments)
    return int(results["exit_code"])
