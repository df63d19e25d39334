"""``dmaproof passthrough``: the kernel's and QEMU's VFIO dirty tracking, without hardware."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UsageError

from ..arguments import positive
from ..passthrough import GROUPS, matrix
from ..passthrough.l1.kernel import KERNELS
from ..passthrough.l1.machine import L1, l1
from ..passthrough.l1.stock import STOCK
from ..passthrough.prove import Request, prove_passthrough, to_text
from ..proof.resolve import chosen_seed
from ..qemu.builds import installed
from ..qemu.choice import find_qemu
from .arguments import add_timeout, describe, reads
from .display import print_text
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_EXAMPLES: Final = """\
examples:
  dmaproof passthrough                     all proofs; the machine is built the first time
  dmaproof passthrough --only migration
  dmaproof passthrough --quick --json - --quiet
  dmaproof passthrough --kernel 7.3 stock --qemu 10.0 11.1    a table of all pairs

exit codes:
  0  all proofs hold, and each injected fault was caught
  1  a proof does not hold
  2  wrong usage
  3  a proof could not be tested, on a machine that is too busy, say; the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "passthrough"),
        description="Boot a machine with a VFIO device whose DMA is known, hold the kernel's dirty "
        "tracking against\nours in it, and migrate guests of QEMU's vfio-pci. The machine is built "
        "from the\ndistribution's archive the first time, which takes some minutes.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=(*KERNELS, STOCK),
        default=[next(iter(KERNELS))],
        help="the machine's (default: %(default)s)",
    )
    parser.add_argument(
        "--qemu",
        nargs="+",
        default=[],
        metavar="VERSION",
        help="under test: fetched ones; default: the machine's own",
    )
    parser.add_argument(
        "--machine-qemu", metavar="PATH", help="runs the machine; default: the system's"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[], help="some of the proofs")
    parser.add_argument("--quick", action="store_true", help="fewer random cases and controls")
    parser.add_argument(
        "--controls",
        type=reads(positive),
        default=1,
        metavar="N",
        help="repeat each fault injected in a migration (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, help="repeats a run's random choices")
    add_timeout(parser)
    parser.add_argument("--keep", action="store_true", help="keep the run's folder and say where")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_outputs(parser, page=False)


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
    tested: list[Path | None] = [_fetched(version) for version in arguments.qemu]
    machine_qemu = find_qemu(arguments.machine_qemu)
    machines = [l1(version) for version in arguments.kernel]
    pairs = [replace(machine, qemu=qemu) for machine in machines for qemu in tested or [None]]
    runs = run_interruptibly(_prove_all(pairs, machine_qemu, request))
    results = runs[0] if len(runs) == 1 else matrix.to_json(runs)
    if not writes_to_stdout(arguments):
        print_text(to_text(runs[0]) if len(runs) == 1 else matrix.table(runs))
    write_outputs(results, arguments)
    return int(results["exit_code"])


def _fetched(version: str) -> Path:
    """The folder of a fetched QEMU: the system's own cannot run in L1.

    Raises:
        UsageError: none of that version was fetched.
    """
    for build in reversed(installed()):
        if build.version == version or build.version.startswith(version + "."):
            return build.path.parent
    raise UsageError(
        f"--qemu {version}: no such version was fetched; 'dmaproof qemu fetch {version}' brings it"
    )


async def _prove_all(
    pairs: Sequence[L1], machine_qemu: Path, request: Request
) -> list[dict[str, Any]]:
    return [await prove_passthrough(machine, machine_qemu, request) for machine in pairs]
