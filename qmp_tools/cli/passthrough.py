"""``dmaproof passthrough``: VFIO dirty tracking of the kernel and of QEMU, without hardware."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..arch.x86_64 import X86_64
from ..arguments import positive
from ..exit_codes import BISECT
from ..passthrough.catalog import GROUPS, OWN_GROUPS, SELFTESTS, Request, select
from ..passthrough.l1.host_qemu import tested_qemu_folder
from ..passthrough.l1.kernel import DEFAULT_KERNEL, KERNELS
from ..passthrough.l1.machine import L1, l1, l1_of_patches, l1_of_source
from ..passthrough.l1.stock import STOCK
from ..passthrough.prove import prove_passthrough, to_text
from ..proof.resolve import chosen_seed
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
  dmaproof passthrough --kernel-source ~/linux    # the kernel of this tree
  dmaproof passthrough --kernel-patch *.patch
  git bisect run dmaproof passthrough --kernel-source . --only differential rules --bisect
  dmaproof matrix --passthrough all --l1-kernel 7.3,stock --qemu 10.0,11.1    # a table

exit codes:
  0  pass: all proofs passed, and each injected fault was caught
  1  fail: a proof failed
  2  wrong usage
  3  not tested: a proof could not be carried out, for instance on a busy machine, or the kernel
     does not build or boot; the message says why

with --bisect:
  125 instead of 3, and 128 for wrong usage, an interruption or a defect in dmaproof
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
    kernel = parser.add_mutually_exclusive_group()
    kernel.add_argument(
        "--kernel",
        choices=(*KERNELS, STOCK),
        default=DEFAULT_KERNEL,
        help=f"kernel of the machine; '{STOCK}': Debian's own (default: %(default)s)",
    )
    kernel.add_argument(
        "--kernel-source",
        type=Path,
        metavar="DIR",
        help="build the kernel of this source tree, which is not modified",
    )
    kernel.add_argument(
        "--kernel-patch",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"build Linux {DEFAULT_KERNEL} with these patches, which patch -p1 applies",
    )
    parser.add_argument(
        "--qemu",
        metavar="QEMU",
        help="QEMU to test: version of a fetched one, or the build folder of your own (default: "
        "the QEMU of the machine's distribution)",
    )
    parser.add_argument(
        "--machine-qemu",
        metavar="PATH",
        help="the QEMU that runs the machine (default: the system's)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"proofs to carry out: groups ({', '.join(GROUPS)}), names, or patterns of names "
        f"(default: all; the {SELFTESTS} only with --kernel-source or --kernel-patch)",
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
    parser.add_argument(
        BISECT,
        action="store_true",
        help="exit as 'git bisect run' expects it: with 125, which skips a commit, instead of 3",
    )
    add_outputs(parser, page=False, ktap=True)


def _run(arguments: argparse.Namespace) -> int:
    request = Request(
        seed=chosen_seed(arguments.seed, bits=16),
        only=select(arguments.only or _default_groups(arguments), quick=arguments.quick),
        quick=arguments.quick,
        controls=arguments.controls,
        timeout_s=arguments.timeout,
    )
    tested = tested_qemu_folder(arguments.qemu) if arguments.qemu else None
    machine_qemu = find_qemu(arguments.machine_qemu, X86_64)
    machine = replace(_machine(arguments), qemu=tested)
    work = prove_passthrough(machine, machine_qemu, request, keep=arguments.keep)
    results = run_interruptibly(work)
    if not writes_to_stdout(arguments):
        print_text(to_text(results))
    write_outputs(results, arguments)
    return int(results["exit_code"])


def _default_groups(arguments: argparse.Namespace) -> Sequence[str]:
    is_own_kernel = bool(arguments.kernel_source or arguments.kernel_patch)
    return tuple(GROUPS) if is_own_kernel else OWN_GROUPS


def _machine(arguments: argparse.Namespace) -> L1:
    """Return the L1 with the kernel to test, which is built if it is not in the cache."""
    if arguments.kernel_source is not None:
        return l1_of_source(arguments.kernel_source)
    if arguments.kernel_patch is not None:
        return l1_of_patches(arguments.kernel_patch)
    return l1(arguments.kernel)
