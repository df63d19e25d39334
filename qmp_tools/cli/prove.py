"""``dmaproof prove``: migrate a guest under DMA load and compare every page."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Final

from dmaproof.faults import known_faults, summary
from dmaproof.trace import Link

from ..exit_codes import EXIT_UNTESTED
from ..passthrough.vfio_functions import Host
from ..proof.display import Display
from ..proof.model import Proof
from ..proof.run import prove
from ..proof.setup import add_proof_options, describe_iommus, describe_ways, setup_of
from ..qemu.machine import format_memory
from ..reports.report import to_json, to_text
from .arguments import Subcommands, add_parser
from .display import display, print_text
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout
from .prove_functions import (
    add_own_guest_options,
    are_functions,
    functions_setup_of,
    refuse_own_guest,
)
from .prove_owned import is_owned, run_owned

_CONTROL_FAULT: Final = "drop-pages=0.01"

_PROVE_EXAMPLES: Final = """\
examples:
  dmaproof prove                              the system's QEMU, everything chosen for you
  dmaproof prove --fault drop-pages=0.01      must fail: shows that losses are caught
  dmaproof prove --qemu 11.1 --memory 5G --way tcp
  dmaproof prove --way multifd-4              any of the ways below
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
    for name, fault in known_faults().items():
        if not fault.needs:
            value = f"={fault.default:g}" if fault.value_means else ""
            lines += [f"  {name}{value}", f"      {summary(fault)}"]
            lines += [f"      The value is {fault.value_means}."] * bool(fault.value_means)
    return "\n".join(lines)


def add(commands: Subcommands) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        "prove",
        reporting_failure(_run, "prove"),
        summary="migrate a guest under DMA load and compare every page",
        description="Migrate a guest while a device outside QEMU writes its RAM, compare every "
        "page of both sides, and say who lost what.",
        epilog="\n\n".join(
            (_PROVE_EXAMPLES.rstrip(), describe_ways(), describe_iommus(), _describe_faults())
        ),
    )
    add_proof_options(parser)
    add_own_guest_options(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--control",
        action="store_true",
        help=f"after a pass, repeat it with {_CONTROL_FAULT} planted, which must be caught",
    )
    run.add_argument("--keep", action="store_true", help="keep the run's folder and say where")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    add_outputs(parser)


async def _prove(arguments: argparse.Namespace, show: Display) -> tuple[Proof, Proof | None]:
    if are_functions(arguments):
        setup = await functions_setup_of(arguments, show, Host())
    else:
        setup = await setup_of(arguments, show)
    faulty = (
        replace(setup, device=setup.device.with_fault(_CONTROL_FAULT))
        if arguments.control
        else None
    )
    proof = await prove(setup, show, keep=arguments.keep)
    if faulty is None or proof.verdict.exit_code != 0:
        return proof, None
    show.say(f"control: the same again with {_CONTROL_FAULT} planted")
    return proof, await prove(faulty, show)


def _caught(control: Proof) -> bool:
    verdict = control.verdict
    return bool(verdict.lost) and all(page.link == Link.LOG for page in verdict.lost)


def _run(arguments: argparse.Namespace) -> int:
    if not are_functions(arguments):
        refuse_own_guest(arguments)
    if is_owned(arguments):
        return run_owned(arguments)
    show = display(quiet=arguments.quiet)
    proof, control = run_interruptibly(_prove(arguments, show))
    answer = to_json(proof)
    answer["commands"] = {"dmaproof": _again(arguments, proof), **answer["commands"]}
    text = to_text(proof)
    if control is not None:
        caught = _caught(control)
        answer["control"] = {**to_json(control), "caught": caught}
        text += f"\n  control      {_CONTROL_FAULT} planted in the same set-up: " + (
            f"caught, {len(control.verdict.lost)} pages" if caught else "NOT CAUGHT"
        )
        if not caught:
            answer["exit_code"] = EXIT_UNTESTED
            answer["verdict"] = f"nothing was proved: a planted {_CONTROL_FAULT} was not caught"
    if not writes_to_stdout(arguments):
        print_text(text)
    write_outputs(answer, arguments)
    code: int = answer["exit_code"]
    return code


def _again(arguments: argparse.Namespace, proof: Proof) -> list[str]:
    """The command line that repeats the run, with all that was chosen for the user."""
    chosen = []
    if arguments.seed is None:
        chosen += ["--seed", str(proof.setup.seed)]
    if arguments.memory is None:
        chosen += ["--memory", format_memory(proof.setup.machine.memory_bytes)]
    if arguments.accel == "auto":
        chosen += ["--accel", proof.setup.machine.accelerator]
    return ["dmaproof", *arguments.command_line, *chosen]
