"""Starts L1, has proofs carried out there, and tells what they found."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

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
"""Of an L1, whose guests in L2 are small."""
_OVERHEAD_BYTES: Final = 256 << 20
"""What an L1 takes besides its memory."""
_WAITS_BETWEEN_LINES: Final = 4
"""So many of its waits an attempt in L1 may take to their bounds before it prints another line."""


@dataclass(frozen=True)
class Request:
    """What is to be proved; no `groups`: all of it."""

    seed: int
    groups: tuple[str, ...] = ()
    quick: bool = False
    controls: int = 1
    """How often each control of a migration is repeated."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Bounds each wait in L1."""
    keep: bool = False


async def prove_passthrough(machine: L1, qemu: Path, request: Request) -> dict[str, Any]:
    """Carry out the proofs in L1, booted by `qemu`; what they found, as for JSON.

    Where there is room for two machines, they share the proofs.

    Raises:
        UntestableError: L1 does not boot, breaks off, or goes silent.
    """
    guests = (bare_guest().kernel, vfio_guest())
    command = "mkdir -p /mnt/taken; exec python3 -m qmp_tools.passthrough.inside "
    command += f"/mnt/{_RESULTS.format('$MACHINE')} /mnt/taken "
    command += " ".join(f"/mnt/{guest.name}" for guest in guests)
    command += f" --seed {request.seed} --timeout {request.timeout_s}"
    if request.quick:
        command += " --quick"
    if request.groups:
        command += " --only " + " ".join(request.groups)
    command += f" --controls {request.controls}"

    def heard(line: str) -> None:
        verdict, tab, told = line.partition("\t")
        if tab:
            _logger.info("%-6s %s", verdict, told)

    machine = replace(machine, memory_mib=_MEMORY_MIB)
    machines = machines_side_by_side(len(os.sched_getaffinity(0)), free_memory_bytes())
    with run_folder(keep=request.keep) as folder:
        if request.keep:
            _logger.info("the run's folder stays: %s", folder)
        job = await run_in_l1(
            *(machine, qemu, command, folder, heard, _WAITS_BETWEEN_LINES * request.timeout_s),
            files=guests,
            machines=machines,
        )
        parts = [
            json.loads((job / _RESULTS.format(number)).read_text())
            for number in range(1, machines + 1)
        ]
    return to_json(joined(parts))


def machines_side_by_side(processors: int, free_bytes: int) -> int:
    """Two, where each has a processor and its memory within `free_bytes`; else one."""
    by_memory = free_bytes // ((_MEMORY_MIB << 20) + _OVERHEAD_BYTES)
    return max(1, min(2, processors, by_memory))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several machines have found, as if one had: the outcomes in the order of the proofs."""
    outcomes = {int(number): it for part in parts for number, it in part["outcomes"].items()}
    return {
        **parts[0],
        "seconds": max(part["seconds"] for part in parts),
        "outcomes": [outcomes[number] for number in sorted(outcomes)],
    }


async def prove_fake_vfio(
    options: ProofOptions, *, keep: bool = False
) -> tuple[dict[str, Any], str]:
    """Carry out the proof of QEMU's vfio-pci on the fake device, in L1; see `device_proof`.

    Returns its report, as for JSON and for people.

    Raises:
        UsageError: an option means nothing to the fake device, or cannot have its value.
        UntestableError: L1 does not boot, or the proof does not come to a verdict.
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
            _logger.info("the run's folder stays: %s", folder)
        job = await run_in_l1(
            *(machine, find_qemu(options.qemu), command, folder, _logger.info),
            _WAITS_BETWEEN_LINES * options.timeout,
            files=(guest,),
        )
        found = json.loads((job / report).read_text())
        text = (job / report).with_suffix(".txt").read_text()
    found["commands"]["dmaproof"] = ["dmaproof", "prove", *options.words()]
    return found, text


def to_json(results: dict[str, Any]) -> dict[str, Any]:
    """What L1's side found, with the verdict, as docs/report.schema.json has it."""
    outcomes = results["outcomes"]
    counts = Counter(State(it["state"]) for it in outcomes)
    held, failed = counts[State.HOLDS], counts[State.FAILS]
    lacking, untested = counts[State.LACKING], counts[State.UNTESTED]
    exit_code = EXIT_PASS if held and not untested else EXIT_UNTESTED
    if failed:
        exit_code = EXIT_LOST
        verdict = f"{failed} proofs do not hold"
    elif untested:
        verdict = f"{held} proofs hold, {untested} were not tested"
    elif lacking:
        verdict = f"{held} proofs hold, for {lacking} kernel or QEMU lack something"
    else:
        verdict = "every proof holds"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "passthrough",
        "verdict": f"{verdict}: the passthrough route on kernel {results['kernel']}",
        "exit_code": exit_code,
        **results,
    }


def to_text(results: dict[str, Any]) -> str:
    """What was found, for people: a line for each group, and each failure."""
    outcomes = results["outcomes"]
    heading = {EXIT_LOST: "FAIL", EXIT_PASS: "PASS"}.get(results["exit_code"], "UNTESTED")
    lines = [f"{heading}: {results['verdict']}", ""]
    for group in dict.fromkeys(outcome["group"] for outcome in outcomes):
        of_group = [outcome for outcome in outcomes if outcome["group"] == group]
        passed = sum(outcome["state"] == State.HOLDS for outcome in of_group)
        seconds = sum(outcome["seconds"] for outcome in of_group)
        lines.append(f"  {group:13} {passed} of {len(of_group)} hold, {seconds:.0f} s")
    for it in outcomes:
        if it["state"] != State.HOLDS:
            how = NOT_HELD[it["state"]]
            lines.append(f"  {how} {it['group']}: {it['name']}: {it['found']}")
    lines.append(f"  seed          {results['seed']}, {results['seconds']:.0f} s in L1")
    return "\n".join(lines)
