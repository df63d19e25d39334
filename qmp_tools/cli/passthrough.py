"""``dmaproof passthrough``: VFIO dirty tracking of the kernel and of QEMU, without hardware."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UsageError

from ..arch.x86_64 import X86_64
from ..arguments import positive
from ..exit_codes import BISECT
from ..passthrough import GROUPS, matrix
from ..passthrough.l1.host_qemu import qemu_for_l1
from ..passthrough.l1.kernel import KERNELS
from ..passthrough.l1.machine import L1, l1, l1_of_patches, l1_of_source
from ..passthrough.l1.stock import STOCK
from ..passthrough.prove import Request, prove_passthrough, to_text
from ..proof.resolve import chosen_seed
from ..qemu.builds import installed, own_builds
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
  dmaproof passthrough --kernel 7.3 stock --qemu 10.0 11.1    # a table of all pairs
  dmaproof passthrough --kernel-source ~/linux    # the kernel of this tree
  dmaproof passthrough --kernel-patch *.patch
  git bisect run dmaproof passthrough --kernel-source . --only differential rules --bisect

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
        nargs="+",
        choices=(*KERNELS, STOCK),
        default=[next(iter(KERNELS))],
        help=f"kernels of the machine; '{STOCK}': Debian's own (default: {next(iter(KERNELS))})",
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
        help=f"build Linux {next(iter(KERNELS))} with these patches, which patch -p1 applies",
    )
    parser.add_argument(
        "--qemu",
        nargs="+",
        default=[],
        metavar="QEMU",
        help="QEMUs to test: versions of fetched ones, or the build folder of your own (default: "
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
        choices=GROUPS,
        default=[],
        metavar="GROUP",
        help=f"groups of proofs to carry out: {', '.join(GROUPS)} (default: all)",
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
    seed = chosen_seed(arguments.seed, bits=16)
    request = Request(
        seed=seed,
        groups=tuple(arguments.only),
        quick=arguments.quick,
        controls=arguments.controls,
        timeout_s=arguments.timeout,
        keep=arguments.keep,
    )
    tested: list[Path | None] = [_tested(qemu) for qemu in arguments.qemu]
    machine_qemu = find_qemu(arguments.machine_qemu, X86_64)
    machines = _machines(arguments)
    pairs = [replace(machine, qemu=qemu) for machine in machines for qemu in tested or [None]]
    runs = run_interruptibly(_prove_all(pairs, machine_qemu, request))
    results = runs[0] if len(runs) == 1 else matrix.to_json(runs)
    if not writes_to_stdout(arguments):
        print_text(to_text(runs[0]) if len(runs) == 1 else matrix.table(runs))
    write_outputs(results, arguments)
    return int(results["exit_code"])


def _machines(arguments: argparse.Namespace) -> list[L1]:
    """Return an L1 for each kernel to test; a kernel that is not in the cache is built."""
    if arguments.kernel_source is not None:
        return [l1_of_source(arguments.kernel_source)]
    if arguments.kernel_patch is not None:
        return [l1_of_patches(arguments.kernel_patch)]
    return [l1(version) for version in arguments.kernel]


def _tested(qemu: str) -> Path:
    """Return the folder of a fetched or own build, or of a QEMU that was built at a path.

    Raises:
        UsageError: no QEMU of that version was fetched, or the path has no QEMU for this.
        UntestableError: the QEMU at the path does not run on this machine.
    """
    if os.sep in qemu or not qemu[:1].isdigit():
        return qemu_for_l1(Path(qemu).expanduser())
    for build in reversed([*installed(X86_64), *own_builds(X86_64)]):
        if build.fits(qemu):
            return build.path.parent
    raise UsageError(
        f"--qemu {qemu}: this version was not fetched; run 'dmaproof qemu fetch {qemu}', or give "
        "the path of a QEMU that you have built, such as ./build"
    )


async def _prove_all(
    pairs: Sequence[L1], machine_qemu: Path, request: Request
) -> list[dict[str, Any]]:
    return [await prove_passthrough(machine, machine_qemu, request) for machine in pairs]
