"""``dmaproof prove``: migrate a guest under DMA load and compare every page."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Any, Final

from dmaproof.errors import UsageError
from dmaproof.faults import known_faults, summary

from ..devices.registry import Control, kind_of
from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..migration.progress_log import OnProgress
from ..passthrough.kinds import fake_device_of, is_fake_vfio
from ..passthrough.prove import prove_fake_vfio
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..proof.run import prove
from ..reports.report import to_json, to_text
from .arguments import describe
from .display import print_text
from .interruption import run_interruptibly
from .options import add_options, describe_iommus, describe_scenarios, given_options
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_logger = logging.getLogger(__name__)

Report = dict[str, Any]

_EXAMPLES: Final = """\
examples:
  dmaproof prove                              the system's QEMU, everything chosen for you
  dmaproof prove --fault drop-pages=0.01      must fail: shows that losses are caught
  dmaproof prove --qemu 11.1 --memory 5G --scenario tcp
  dmaproof prove --scenario multifd-4         any of the scenarios below
  dmaproof prove --guest bare                 no kernel to boot: the quickest proof
  dmaproof prove --workload pattern=sequential,huge_every=4
  dmaproof prove --iommu intel                IOVAs that are not guest-physical addresses
  dmaproof prove --device vfio-fake --control
                                              QEMU's own vfio-pci, in a machine of ours
  dmaproof prove --device vfio:3b:00.2,3b:00.3 --kernel vmlinuz --initrd initrd.img
  dmaproof prove --qemu 11.1 --qemu-destination /usr/bin/qemu-system-x86_64
  dmaproof prove --device qemu:virtio-blk-pci --guest bare
  dmaproof prove --report proof.html --junit proof.xml
  dmaproof prove --json - --quiet | jq .verdict

exit codes:
  0  every page equal, and the guest went on correctly
  1  pages were lost or never reported, or the guest found errors
  2  wrong usage
  3  could not be tested; the message says why
"""


def _describe_faults() -> str:
    lines = ["faults that a proof can have (dmaproof faults tries them all, and more):"]
    for name, fault in known_faults().usable().items():
        if not fault.needs:
            value = f"={fault.default:g}" if fault.value_means else ""
            lines += [f"  {name}{value}", f"      {summary(fault)}"]
            lines += [f"      The value is {fault.value_means}."] * bool(fault.value_means)
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "prove"),
        description="Migrate a guest while a device outside QEMU writes its RAM, compare every "
        "page of both sides, and say who lost what.",
        epilog="\n\n".join(
            (_EXAMPLES.rstrip(), describe_scenarios(), describe_iommus(), _describe_faults())
        ),
    )
    add_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--control",
        action="store_true",
        help="after a pass, repeat it with a fault injected, which must be caught",
    )
    run.add_argument("--keep", action="store_true", help="keep the run's folder and say where")
    run.add_argument("--quiet", action="store_true", help="show no progress")
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
    """What ``--control`` injects into the device.

    Raises:
        UsageError: nothing can be injected, or it would not show.
    """
    control = kind_of(options.devices, options.device_command).control
    if control is None:
        raise UsageError(
            f"--control: no fault can be injected in --device {' and '.join(options.devices)}"
        )
    if is_fake_vfio(options):
        fake_device_of(replace(options, fault=control.fault))
    return control


async def _prove(
    options: ProofOptions, on_progress: OnProgress | None, keep: bool, control: Control | None
) -> tuple[Report, str]:
    report, text, options = await _prove_once(options, on_progress, keep)
    if control is None or report["exit_code"] != EXIT_PASS:
        return report, text
    _logger.info("control: the same again with %s injected", control.fault)
    injected = replace(options, fault=control.fault)
    repeated, _, _ = await _prove_once(injected, on_progress, False)
    return report, f"{text}\n{add_control(report, repeated, control)}"


async def _prove_once(
    options: ProofOptions, on_progress: OnProgress | None, keep: bool
) -> tuple[Report, str, ProofOptions]:
    """One proof: its report as for JSON and for people, and the options that repeat it."""
    if is_fake_vfio(options):
        report, text = await prove_fake_vfio(options, keep=keep)
        return report, text, replace(options, seed=report["setup"]["seed"])
    setup = await resolve(options)
    proof = await prove(setup, on_progress, keep=keep)
    return to_json(proof), to_text(proof), setup.options


def add_control(report: Report, repeated: Report, control: Control) -> str:
    """Add the report of a proof `repeated` with a fault to the one that has passed.

    A control that was not caught takes the pass away. Returns a line for people.
    """
    lost = repeated["lost_pages"]
    caught = bool(lost) and all(page["link"] == control.link for page in lost)
    report["control"] = {**repeated, "caught": caught}
    if not caught:
        report["exit_code"] = EXIT_UNTESTED
        report["verdict"] = f"nothing was proved: a injected {control.fault} was not caught"
    found = f"caught, {len(lost)} pages" if caught else "NOT CAUGHT"
    return f"  control      {control.fault} injected in the same set-up: {found}"
