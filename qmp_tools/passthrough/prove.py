"""Starts L1, has all proofs carried out there, and tells what they found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError

from ..display import Display
from ..l1.machine import L1, run_in_l1
from ..processes.run_folder import run_folder
from ..reports.report import SCHEMA_VERSION
from ..verdict import EXIT_LOST, EXIT_PASS

_RESULTS: Final = "results.json"


@dataclass(frozen=True)
class Request:
    """What is to be proved; no `groups`: all of it."""

    seed: int
    groups: tuple[str, ...] = ()
    quick: bool = False
    timeout_s: float = 600.0
    keep: bool = False


async def prove_passthrough(
    machine: L1, qemu: Path, request: Request, show: Display
) -> dict[str, Any]:
    """Carry out the proofs in L1, booted by `qemu`; what they found, as for JSON.

    Raises:
        UntestableError: L1 does not boot, or breaks off.
    """
    command = f"python3 -m qmp_tools.passthrough.inside /mnt/{_RESULTS} --seed {request.seed}"
    if request.quick:
        command += " --quick"
    if request.groups:
        command += " --only " + " ".join(request.groups)
    said: list[str] = []

    def heard(line: str) -> None:
        said.append(line)
        verdict, tab, told = line.partition("\t")
        if tab:
            show.say(f"{verdict:6} {told}")

    with run_folder(keep=request.keep) as folder:
        if request.keep:
            show.say(f"the run's folder stays: {folder}")
        code, job = await run_in_l1(machine, qemu, command, folder, heard, request.timeout_s)
        try:
            results: dict[str, Any] = json.loads((job / _RESULTS).read_text())
        except (OSError, ValueError):
            told = "\n".join(f"    {line}" for line in said[-15:])
            raise UntestableError(f"L1's proofs broke off with exit code {code}:\n{told}") from None
    return to_json(results)


def to_json(results: dict[str, Any]) -> dict[str, Any]:
    """What L1's side found, with the verdict, as docs/report.schema.json has it."""
    failed = sum(not outcome["passed"] for outcome in results["outcomes"])
    verdict = f"{failed} proofs do not hold" if failed else "every proof holds"
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "passthrough",
        "verdict": f"{verdict}: the passthrough route on kernel {results['kernel']}",
        "exit_code": EXIT_LOST if failed else EXIT_PASS,
        **results,
    }


def to_text(results: dict[str, Any]) -> str:
    """What was found, for people: a line for each group, and each failure."""
    outcomes = results["outcomes"]
    failed = [outcome for outcome in outcomes if not outcome["passed"]]
    lines = [f"{'FAIL' if failed else 'PASS'}: {results['verdict']}", ""]
    for group in dict.fromkeys(outcome["group"] for outcome in outcomes):
        of_group = [outcome for outcome in outcomes if outcome["group"] == group]
        passed = sum(outcome["passed"] for outcome in of_group)
        lines.append(f"  {group:13} {passed} of {len(of_group)} hold")
    lines += [f"  FAILED {it['group']}: {it['name']}: {it['found']}" for it in failed]
    lines.append(f"  seed          {results['seed']}, {results['seconds']:.0f} s in L1")
    return "\n".join(lines)
