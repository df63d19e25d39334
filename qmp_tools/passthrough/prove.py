"""Boot L1, carry out proofs in it, and report their outcomes."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..arch.x86_64 import X86_64
from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..guest.bare import bare_guest, vfio_guest
from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..matrix.resources import free_memory_bytes
from ..proof.options import ProofOptions
from ..proof.resolve import chosen_seed
from ..qemu.choice import find_qemu
from ..reports.report import SCHEMA_VERSION
from .kinds import fake_device_of
from .l1.machine import L1, l1, run_in_l1
from .l1.root import quoted
from .outcome import NOT_HELD, State

_logger = logging.getLogger(__name__)

_RESULTS: Final = "results-{}.json"
_MEMORY_MIB: Final = 1024
"""The memory of an L1, whose guests in L2 are small."""
_OVERHEAD_BYTES: Final = 256 << 20
"""The memory that an L1's QEMU takes besides its guest RAM."""
_WAITS_BETWEEN_LINES: Final = 4
"""An attempt in L1 may use up this many timeouts before it prints its next line."""


@dataclass(frozen=True)
class Request:
    """Which proofs to carry out; all of them if `groups` and `proofs` are empty."""

    seed: int
    groups: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()
    """The names of the only proofs to carry out."""
    quick: bool = False
    controls: int = 1
    """The number of repetitions of each control of a migration."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """The bound of each wait in L1."""
    keep: bool = False


async def prove_passthrough(machine: L1, qemu: Path, request: Request) -> dict[str, Any]:
    """Carry out the proofs in L1, booted by `qemu`; return the report as for JSON.

    If the host has processors and memory for two machines, they share the proofs, unless the
    request names the proofs.

    Raises:
        UntestableError: L1 does not boot, ends early, or prints nothing until the timeout.
    """
    guests = (bare_guest(X86_64).kernel, vfio_guest())
    command = "mkdir -p /mnt/taken; exec python3 -m qmp_tools.passthrough.inside "
    command += f"/mnt/{_RESULTS.format('$MACHINE')} /mnt/taken "
    command += " ".join(f"/mnt/{guest.name}" for guest in guests)
    command += f" --seed {request.seed} --timeout {request.timeout_s}"
    if request.quick:
        command += " --quick"
    if request.groups:
        command += " --only " + " ".join(request.groups)
    if request.proofs:
        command += " --proofs " + quoted(*request.proofs)
    command += f" --controls {request.controls}"

    def log_outcome(line: str) -> None:
        state, tab, text = line.partition("\t")
        if tab:
            _logger.info("%-11s %s", state, text)

    machine = replace(machine, memory_mib=_MEMORY_MIB)
    machines = machines_side_by_side(len(os.sched_getaffinity(0)), free_memory_bytes())
    if request.proofs:
        machines = 1  # a few proofs take less time than the boot of a second machine
    with run_folder(keep=request.keep) as folder:
        if request.keep:
            _logger.info("keeping the run's folder: %s", folder)
        job = await run_in_l1(
            *(machine, qemu, command, folder, log_outcome),
            _WAITS_BETWEEN_LINES * request.timeout_s,
            files=guests,
            machines=machines,
        )
        parts = [
            json.loads((job / _RESULTS.format(number)).read_text())
            for number in range(1, machines + 1)
        ]
    results = joined(parts)
    if machine.origin is not None:
        results["kernel_source"] = machine.origin
    return to_json(results)


def machines_side_by_side(processors: int, free_bytes: int) -> int:
    """Return 2 if there are processors and `free_bytes` of memory for two machines, else 1."""
    by_memory = free_bytes // ((_MEMORY_MIB << 20) + _OVERHEAD_BYTES)
    return max(1, min(2, processors, by_memory))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of several machines; the outcomes are in the order of the proofs."""
    outcomes = {
        int(number): outcome for part in parts for number, outcome in part["outcomes"].items()
    }
    return {
        **parts[0],
        "seconds": max(part["seconds"] for part in parts),
        "outcomes": [outcomes[number] for number in sorted(outcomes)],
    }


async def prove_fake_vfio(
    options: ProofOptions, *, keep: bool = False
) -> tuple[dict[str, Any], str]:
    """Carry out the proof of QEMU's vfio-pci on the fake device, in L1; see `device_proof`.

    Returns:
        The report as for JSON, and as text.

    Raises:
        UsageError: an option does not apply to the fake device, or has an invalid value.
        UntestableError: L1 does not boot, or the proof ends without a verdict.
    """
    options = replace(options, seed=chosen_seed(options.seed, bits=16))
    device = fake_device_of(options)
    machine = l1()
    guest = vfio_guest()
    report = _RESULTS.format(1)
    command = f"python3 -m qmp_tools.passthrough.device_proof /mnt/{report} /mnt/{guest.name} "
    command += quoted("--tracking", device.tracking, "--seed", str(options.seed))
    command += f" --timeout {options.timeout}"
    if device.fault:
        command += " " + quoted("--fault", device.fault)
    with run_folder(keep=keep) as folder:
        if keep:
            _logger.info("keeping the run's folder: %s", folder)
        job = await run_in_l1(
            *(machine, find_qemu(options.qemu, X86_64), command, folder, _logger.info),
            _WAITS_BETWEEN_LINES * options.timeout,
            files=(guest,),
        )
        found = json.loads((job / report).read_text())
        text = (job / report).with_suffix(".txt").read_text()
    found["commands"]["dmaproof"] = ["dmaproof", "prove", *options.words()]
    return found, text


def to_json(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results from L1 with the verdict, as docs/report.schema.json describes it."""
    outcomes = results["outcomes"]
    counts = Counter(State(outcome["state"]) for outcome in outcomes)
    held, failed = counts[State.HOLDS], counts[State.FAILS]
    unsupported, untested = counts[State.NOT_SUPPORTED], counts[State.UNTESTED]
    exit_code = EXIT_PASS if held and not untested else EXIT_UNTESTED
    if failed:
        exit_code = EXIT_LOST
        verdict = f"{failed} of {len(outcomes)} proofs do not hold"
    elif untested:
        verdict = f"{held} of {len(outcomes)} proofs hold, {untested} could not be tested"
    elif unsupported:
        verdict = (
            f"{held} of {len(outcomes)} proofs hold, "
            f"{unsupported} do not apply to this kernel or QEMU"
        )
    else:
        verdict = "every proof holds"
    kernel = results["kernel"]
    if "kernel_source" in results:
        kernel += f" from {results['kernel_source']}"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "passthrough",
        "verdict": f"{verdict}: the passthrough route on kernel {kernel}",
        "exit_code": exit_code,
        **results,
    }


def to_text(results: dict[str, Any]) -> str:
    """Return the report as text: a line for each group, and for each proof that does not hold."""
    outcomes = results["outcomes"]
    heading = {EXIT_LOST: "FAIL", EXIT_PASS: "PASS"}.get(results["exit_code"], "UNTESTED")
    lines = [f"{heading}: {results['verdict']}", ""]
    for group in dict.fromkeys(outcome["group"] for outcome in outcomes):
        of_group = [outcome for outcome in outcomes if outcome["group"] == group]
        passed = sum(outcome["state"] == State.HOLDS for outcome in of_group)
        seconds = sum(outcome["seconds"] for outcome in of_group)
        lines.append(f"  {group:13} {passed} of {len(of_group)} hold, {seconds:.0f} s")
    for outcome in outcomes:
        if outcome["state"] != State.HOLDS:
            state = NOT_HELD[outcome["state"]]
            lines.append(f"  {state} {outcome['group']}: {outcome['name']}: {outcome['found']}")
    lines.append(f"  seed          {results['seed']}, {results['seconds']:.0f} s in L1")
    return "\n".join(lines)
