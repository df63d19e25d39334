"""``dmaproof faults``: inject every known fault, and report which were caught."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from dmaproof.faults import known_faults

from ..arguments import positive
from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..host.run_folder import run_folder
from ..proof.model import Setup
from ..proof.resolve import resolve
from ..reports.report import SCHEMA_VERSION
from ..testbed.fault_trials import CONTROL, HEADINGS, Bench, Row, try_faults
from .arguments import add_quiet, describe, reads
from .display import print_table
from .interruption import run_interruptibly
from .log import OfManyProofs
from .options import SETUP_GROUPS, add_options, given_options, options_of_groups
from .outputs import add_outputs, write_outputs, writes_to_stdout

_EXAMPLES: Final = """\
examples:
  dmaproof faults                           # every fault; takes some minutes
  dmaproof faults --on testbed --runs 20    # without QEMU; takes a minute or two
  dmaproof faults --only used-ring-unlogged --json -

'dmaproof list faults' describes the faults.

exit codes:
  0  pass: every fault was caught in at least 19 of 20 runs, and the run without a fault never
     raised an alarm
  1  fail: a fault was not caught, or the run without a fault raised an alarm
  2  wrong usage
  3  not tested: a run came to no verdict
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        _run,
        description="Inject every known fault on a test bed without QEMU, and in a real proof "
        "where one device\non one QEMU can show it; report which were caught, by which check, at "
        "which link.",
        epilog=_EXAMPLES,
        usage="[OPTION]...",
    )
    parser.add_argument(
        "--runs",
        type=reads(positive),
        default=1,
        metavar="N",
        help="how often to inject each fault (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="seed of the first run; each further run adds 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=(CONTROL, *known_faults()),
        metavar="NAME",
        help=f"one fault, or '{CONTROL}' for the run without a fault; may be repeated (default: "
        "all of them)",
    )
    parser.add_argument(
        "--on",
        choices=("both", *Bench),
        default="both",
        help="where to inject: the test bed, real proofs, or both (default: %(default)s)",
    )
    add_quiet(parser)
    add_options(parser, options_of_groups(SETUP_GROUPS))
    add_outputs(parser, page=False)


def _run(arguments: argparse.Namespace) -> int:
    arguments.log.addFilter(OfManyProofs())
    benches = list(Bench) if arguments.on == "both" else [Bench(arguments.on)]
    options = given_options(arguments)

    async def make_setup(fault: str | None, seed: int) -> Setup:
        return await resolve(replace(options, fault=fault, seed=seed))

    with run_folder() as folder:
        trials = try_faults(
            arguments.only or (CONTROL, *known_faults()),
            benches,
            range(arguments.seed, arguments.seed + arguments.runs),
            make_setup,
            folder,
            options.timeout,
            skips_refused=not arguments.only,
        )
        rows = run_interruptibly(trials)
    if not writes_to_stdout(arguments):
        print_table(HEADINGS, [row.cells() for row in rows])
    answer = _to_json(rows)
    write_outputs(answer, arguments)
    code: int = answer["exit_code"]
    return code


def _to_json(rows: Sequence[Row]) -> dict[str, Any]:
    missed = [row.fault for row in rows if not row.as_wanted]
    if any(trial.untested for row in rows for trial in row.trials):
        code, verdict = EXIT_UNTESTED, "a run came to no verdict"
    elif missed:
        code, verdict = EXIT_LOST, f"not as expected: {', '.join(dict.fromkeys(missed))}"
    else:
        code, verdict = EXIT_PASS, "every fault was caught, and there was no false alarm"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "faults",
        "verdict": verdict,
        "exit_code": code,
        "faults": [row.to_json() for row in rows],
    }
