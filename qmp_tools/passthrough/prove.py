"""Starts L1, has all proofs carried out there, and tells what they found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError

from ..display import Display
from ..l1.machine import L1, run_in_l1
from ..run_folder import run_folder

SCHEMA_VERSION: Final = 1
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
    return {"schema_version": SCHEMA_VERSION, "exit_code": code, **results}


def to_text(results: dict[str, Any]) -> str:
    """What was found, for people: a line for each group, and each failure."""
    outcomes = results["outcomes"]
    failed = [outcome for outcome in outcomes if not outcome["passed"]]
    word = f"FAIL: {len(failed)} of {len(outcomes)} proofs" if failed else "PASS"
    lines = [f"{word}: the passthrough route on kernel {results['kernel']}", ""]
    for group in dict.fromkeys(outcome["group"] for outcome in outcomes):
        of_group = [outcome for outcome in outcomes if outcome["group"] == group]
        passed = sum(outcome["passed"] for outcome in of_group)
        lines.append(f"  {group:13} {passed} of {len(of_group)} hold")
    lines += [f"  FAILED {it['group']}: {it['name']}: {it['found']}" for it in failed]
    lines.append(f"  seed          {results['seed']}, {results['seconds']:.0f} s in L1")
    return "\n".join(lines)
