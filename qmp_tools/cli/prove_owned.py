"""``dmaproof prove --device vfio-fake``: QEMU's own vfio-pci, in L1, on a device that is known.

All of the proof happens in L1, with a machine and a guest of its own; what is asked for here goes
in as a command line, and the report comes out.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from dmaproof.errors import UsageError
from dmaproof.trace import Link

from ..exit_codes import EXIT_PASS, EXIT_UNTESTED
from ..passthrough.l1.machine import l1
from ..passthrough.owned_device import NAME
from ..passthrough.owned_proof import parse_fault
from ..passthrough.prove import OwnedRequest, prove_owned
from ..passthrough.tracking import TRACKINGS
from ..proof.display import Display
from ..proof.setup import limits_of, parse_proof_options, seed_of
from ..qemu.choice import find_qemu
from .arguments import sole_device
from .display import display, print_text
from .interruption import run_interruptibly
from .outputs import write_outputs, writes_to_stdout

_TRACKING: Final = "iommufd"
_CONTROL_FAULT: Final = "drop=50"
_TAKEN: Final = frozenset({"device", "qemu", "fault", "seed", "timeout"})
"""Those of `prove`'s options that mean something here."""


def is_owned(arguments: argparse.Namespace) -> bool:
    """Whether the device that was asked for is the fake VFIO device."""
    return sole_device(arguments, NAME) is not None


def run_owned(arguments: argparse.Namespace) -> int:
    """Carry the proof out; returns its exit code.

    Raises:
        UsageError: an option does not apply, or has no such value.
        UntestableError: the proof does not come to a verdict.
    """
    _, colon, tracking = (sole_device(arguments, NAME) or NAME).partition(":")
    tracking = tracking if colon else _TRACKING
    _check(arguments, tracking)
    show = display(quiet=arguments.quiet)
    seed = seed_of(arguments, bits=16)
    timeout_s = limits_of(arguments).timeout_s
    request = OwnedRequest(seed, tracking, arguments.fault, timeout_s, arguments.keep)
    report, text = _prove(arguments, request, show)
    report["commands"] = {
        "dmaproof": ["dmaproof", *arguments.command_line]
        + ([] if arguments.seed is not None else ["--seed", str(seed)]),
        **report["commands"],
    }
    if arguments.control and report["exit_code"] == EXIT_PASS:
        show.say(f"control: the same again with {_CONTROL_FAULT} planted")
        faulty = OwnedRequest(seed, tracking, _CONTROL_FAULT, timeout_s)
        control, _ = _prove(arguments, faulty, show)
        text += "\n" + add_control(report, control)
    if not writes_to_stdout(arguments):
        print_text(text)
    write_outputs(report, arguments)
    return int(report["exit_code"])


def add_control(report: dict[str, Any], control: dict[str, Any]) -> str:
    """Put `control` into `report`, which has passed; returns what is told of it.

    A control that was not caught takes the pass away.
    """
    lost = control["lost_pages"]
    caught = bool(lost) and all(page["link"] == Link.TRACKER for page in lost)
    report["control"] = {**control, "caught": caught}
    if not caught:
        report["exit_code"] = EXIT_UNTESTED
        report["verdict"] = f"nothing was proved: a planted {_CONTROL_FAULT} was not caught"
    found = f"caught, {len(lost)} pages" if caught else "NOT CAUGHT"
    return f"  control      {_CONTROL_FAULT} planted in the same set-up: {found}"


def _prove(
    arguments: argparse.Namespace, request: OwnedRequest, show: Display
) -> tuple[dict[str, Any], str]:
    machine = l1(say=show.say)
    return run_interruptibly(prove_owned(machine, find_qemu(arguments.qemu), request, show))


def _check(arguments: argparse.Namespace, tracking: str) -> None:
    if tracking not in TRACKINGS:
        raise UsageError(f"--device {NAME}:{tracking}: {NAME} has {', '.join(TRACKINGS)}")
    for name, default in vars(parse_proof_options({})).items():
        if name not in _TAKEN and getattr(arguments, name) != default:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} does not apply to --device {NAME}, which has its own")
    if arguments.fault:
        parse_fault(arguments.fault)
    if (arguments.fault or arguments.control) and not TRACKINGS[tracking].device:
        raise UsageError(
            f"--device {NAME}:{tracking}: QEMU does not ask the device there, so none of its "
            "faults can show"
        )
