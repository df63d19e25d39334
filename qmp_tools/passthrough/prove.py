"""Starts L1, has proofs carried out there, and tells what they found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError

from ..display import Display
from ..guest.bare import bare_guest, vfio_guest
from ..l1.machine import L1, run_in_l1
from ..l1.root import quoted
from ..processes.run_folder import run_folder
from ..reports.report import SCHEMA_VERSION
from ..verdict import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED

_RESULTS: Final = "results.json"
_AROUND_S: Final = 300.0
"""More than all that a proof in L1 does besides to migrate."""


@dataclass(frozen=True)
class Request:
    """What is to be proved; no `groups`: all of it."""

    seed: int
    groups: tuple[str, ...] = ()
    quick: bool = False
    controls: int = 1
    """How often each control of a migration is repeated."""
    timeout_s: float = 1200.0
    keep: bool = False


async def prove_passthrough(
    machine: L1, qemu: Path, request: Request, show: Display
) -> dict[str, Any]:
    """Carry out the proofs in L1, booted by `qemu`; what they found, as for JSON.

    Raises:
        UntestableError: L1 does not boot, or breaks off.
    """
    guests = (bare_guest(show.say).kernel, vfio_guest(show.say))
    command = f"python3 -m qmp_tools.passthrough.inside /mnt/{_RESULTS} "
    command += " ".join(f"/mnt/{guest.name}" for guest in guests)
    command += f" --seed {request.seed}"
    if request.quick:
        command += " --quick"
    if request.groups:
        command += " --only " + " ".join(request.groups)
    command += f" --controls {request.controls}"

    def heard(line: str) -> None:
        verdict, tab, told = line.partition("\t")
        if tab:
            show.say(f"{verdict:6} {told}")

    with run_folder(keep=request.keep) as folder:
        if request.keep:
            show.say(f"the run's folder stays: {folder}")
        job = await _run(machine, qemu, command, folder, heard, request.timeout_s, guests)
        results: dict[str, Any] = json.loads((job / _RESULTS).read_text())
    return to_json(results)


@dataclass(frozen=True)
class OwnedRequest:
    """A proof of QEMU's vfio-pci on the fake device; see `owned_proof`. `timeout_s` is the
    migration's."""

    seed: int
    tracking: str
    fault: str | None = None
    timeout_s: float = 120.0
    keep: bool = False


async def prove_owned(
    machine: L1, qemu: Path, request: OwnedRequest, show: Display
) -> tuple[dict[str, Any], str]:
    """Carry out one proof in L1, booted by `qemu`; its report as for JSON, and for people.

    Raises:
        UntestableError: L1 does not boot, or the proof does not come to a verdict.
    """
    guest = vfio_guest(show.say)
    command = f"python3 -m qmp_tools.passthrough.owned_proof /mnt/{_RESULTS} /mnt/{guest.name} "
    command += quoted("--tracking", request.tracking, "--seed", str(request.seed))
    command += f" --timeout {request.timeout_s}"
    if request.fault:
        command += " " + quoted("--fault", request.fault)
    with run_folder(keep=request.keep) as folder:
        if request.keep:
            show.say(f"the run's folder stays: {folder}")
        timeout_s = request.timeout_s + _AROUND_S
        job = await _run(machine, qemu, command, folder, show.say, timeout_s, (guest,))
        report = job / _RESULTS
        return json.loads(report.read_text()), report.with_suffix(".txt").read_text()


async def _run(
    machine: L1,
    qemu: Path,
    command: str,
    folder: Path,
    heard: Callable[[str], None],
    timeout_s: float,
    guests: Sequence[Path],
) -> Path:
    """Run `command` in L1 with `guests` beside it; the folder in which it has left its results.

    Raises:
        UntestableError: it has left none.
    """
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        heard(line)

    code, job = await run_in_l1(machine, qemu, command, folder, hear, timeout_s, files=guests)
    if not (job / _RESULTS).exists():
        told = "\n".join(f"    {line}" for line in said[-15:])
        raise UntestableError(f"L1's proof broke off with exit code {code}:\n{told}")
    return job


def to_json(results: dict[str, Any]) -> dict[str, Any]:
    """What L1's side found, with the verdict, as docs/report.schema.json has it."""
    outcomes = results["outcomes"]
    held = sum(it["passed"] for it in outcomes)
    failed = sum(not it["passed"] and not it["lacking"] for it in outcomes)
    exit_code = EXIT_LOST if failed else EXIT_PASS if held else EXIT_UNTESTED
    if failed:
        verdict = f"{failed} proofs do not hold"
    elif held < len(outcomes):
        verdict = f"{held} proofs hold, for {len(outcomes) - held} kernel or QEMU lack something"
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
        passed = sum(outcome["passed"] for outcome in of_group)
        lines.append(f"  {group:13} {passed} of {len(of_group)} hold")
    for it in outcomes:
        if not it["passed"]:
            how = "lacking" if it["lacking"] else "FAILED"
            lines.append(f"  {how} {it['group']}: {it['name']}: {it['found']}")
    lines.append(f"  seed          {results['seed']}, {results['seconds']:.0f} s in L1")
    return "\n".join(lines)
