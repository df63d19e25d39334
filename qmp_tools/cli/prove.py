"""``dmaproof prove``: migrate a guest under DMA load and compare every page."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Any, Final

from dmaproof.errors import UsageError

from ..devices.registry import Control, kind_of
from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..migration.progress_log import OnProgress
from ..migration.scenarios import find_scenario
from ..passthrough.nested import nested_options, prove_nested, runs_in_l1
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..proof.run import prove
from ..reports.report import to_json, to_text
from .arguments import add_keep, add_quiet, describe
from .display import print_text
from .interruption import run_interruptibly
from .options import add_options, given_options
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_logger = logging.getLogger(__name__)

Report = dict[str, Any]

_EXAMPLES: Final = """\
examples:
  dmaproof prove                            # the default of each option
  dmaproof prove --guest bare               # no kernel to boot: the fastest
  dmaproof prove --fault drop-pages=0.01    # must fail: losses are caught
  dmaproof prove --qemu 11.1 --scenario multifd-4 --memory 5G
  dmaproof prove --json - --quiet | jq .verdict

'dmaproof list' prints the values of --scenario, --device, --fault and others.

exit codes:
  0  pass: every page is equal, and the guest continued without errors
  1  fail: pages were lost or not reported dirty, or the guest found errors
  2  wrong usage
  3  not tested: the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "prove"),
        description="Migrate a guest while a device outside QEMU writes its RAM, compare every\n"
        "page of source and destination, and report which pages were lost at which\nlink.",
        epilog=_EXAMPLES,
        usage="[OPTION]...",
    )
    add_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--control",
        action="store_true",
        help="after a pass, repeat the proof with a fault, which must be caught",
    )
    add_keep(run)
    add_quiet(run)
    add_outputs(parser)


def _run(arguments: argparse.Namespace) -> int:
    options = given_options(arguments)
    control = _control_of(options) if arguments.control else None
    on_progress = arguments.log.on_progress
    report, text = run_interruptibly(_prove(options, on_progress, arguments.keep, control))
    if not writes_to_stdout(arguments):
        print_text(text)
    write_outputs(report, arguments)
    return int(report["exit_code"])


def _control_of(options: ProofOptions) -> Control:
    """Return the fault that ``--control`` injects into the device.

    Raises:
        UsageError: no fault can be injected into the device, or the fault would have no effect.
    """
    control = kind_of(options.devices, options.device_command).control
    if control is None:
        raise UsageError(
            f"--control: no fault can be injected into --device {' and '.join(options.devices)}; "
            "leave out --control"
        )
    if runs_in_l1(options):
        nested_options(replace(options, fault=control.fault))
    else:
        find_scenario(options.scenario).require_dirty_log("--control")
    return control


async def _prove(
    options: ProofOptions, on_progress: OnProgress | None, keep: bool, control: Control | None
) -> tuple[Report, str]:
    report, text, options = await _prove_once(options, on_progress, keep)
    if control is None or report["exit_code"] != EXIT_PASS:
        return report, text
    _logger.info("control: repeating the proof with the fault %s", control.fault)
    injected = replace(options, fault=control.fault)
    repeated, _, _ = await _prove_once(injected, on_progress, False)
    return report, f"{text}\n{add_control(report, repeated, control)}"


async def _prove_once(
    options: ProofOptions, on_progress: OnProgress | None, keep: bool
) -> tuple[Report, str, ProofOptions]:
    """Carry out a proof; return its JSON, its text, and the options that repeat it."""
    if runs_in_l1(options):
        report, text = await prove_nested(options, keep=keep)
        return report, text, replace(options, seed=report["setup"]["seed"])
    setup = await resolve(options)
    proof = await prove(setup, on_progress, keep=keep)
    return to_json(proof), to_text(proof), setup.options


def add_control(report: Report, repeated: Report, control: Control) -> str:
    """Add the report of the proof `repeated` with a fault to the report of a pass.

    If the fault was not caught, the pass becomes untested. Returns a line for people.
    """
    lost = repeated["lost_pages"]
    caught = bool(lost) and all(page["link"] == control.link for page in lost)
    report["control"] = {**repeated, "caught": caught}
    if not caught:
        report["exit_code"] = EXIT_UNTESTED
        report["verdict"] = f"nothing was proved: the injected fault {control.fault} was not caught"
    found = f"caught, {len(lost)} pages" if caught else "NOT CAUGHT"
    return f"  control      {control.fault} injected in the same set-up: {found}"
