"""Boot L1, carry out proofs in it, and report their outcomes."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..arch.x86_64 import X86_64
from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..guest.bare import bare_guest, vfio_guest
from ..host.run_folder import run_folder
from ..matrix.resources import free_memory_bytes
from ..reports.report import SCHEMA_VERSION
from .catalog import Request
from .inside import CLAIMED, MACHINE, OUTCOMES, REQUEST
from .l1.machine import JOB, L1, run_in_l1
from .l1.selftests import Hardware, selftest_hardware
from .outcome import NOT_HELD, State

_logger = logging.getLogger(__name__)

_MEMORY_MIB: Final = 1024
"""The memory of an L1, whose guests in L2 are small."""
_OVERHEAD_BYTES: Final = 256 << 20
"""The memory that an L1's QEMU takes besides its guest RAM."""
_MACHINE_BYTES: Final = (_MEMORY_MIB << 20) + _OVERHEAD_BYTES
"""The memory that one machine takes."""
_FEW_PROOFS: Final = 8
"""So many proofs take less time than the boot of a second machine."""
_HARDWARE_BYTES: Final = (Hardware.memory_mib - _MEMORY_MIB) << 20
"""The memory that the first machine takes besides if it carries out the kernel's selftests."""
_WAITS_BETWEEN_LINES: Final = 4
"""An attempt in L1 may use up this many timeouts before it prints its next line."""

OnOutcome = Callable[[dict[str, Any]], None]
"""Called with the outcome of each proof, as for JSON, as soon as it has ended."""


def _ignore(outcome: dict[str, Any]) -> None:
    pass


async def prove_passthrough(
    machine: L1,
    qemu: Path,
    request: Request,
    *,
    keep: bool = False,
    on_outcome: OnOutcome = _ignore,
) -> dict[str, Any]:
    """Carry out the proofs in L1, booted by `qemu`; return the report as for JSON.

    If the host has processors and memory for two machines, they share the proofs, unless these are
    few.

    Raises:
        UntestableError: L1 does not boot, ends early, or prints nothing until the timeout.
    """
    machines, _ = machines_of(request)
    processors = max(1, min(machine.processors, len(os.sched_getaffinity(0)) // machines))
    machine = replace(machine, memory_mib=_MEMORY_MIB, processors=processors)
    outcomes: dict[int, dict[str, Any]] = {}
    with run_folder(keep=keep) as folder:
        if keep:
            _logger.info("keeping the run's folder: %s", folder)
        if request.has_selftests:
            machine = replace(machine, first=selftest_hardware(qemu, machine.root, folder))
        given = folder / REQUEST
        given.write_text(json.dumps(request.to_json()))

        def read_line(line: str) -> None:
            state, _, rest = line.partition("\t")
            number, tab, text = rest.partition("\t")
            _logger.info("%-11s %s", state, text or rest)
            if not tab:  # an attempt that is repeated
                return
            file = folder / JOB / OUTCOMES / f"{number}.json"
            outcomes[int(number)] = json.loads(file.read_text())
            on_outcome(outcomes[int(number)])

        job = await run_in_l1(
            machine,
            qemu,
            f"mkdir -p /mnt/{OUTCOMES} /mnt/{CLAIMED}\n"
            "exec python3 -m qmp_tools.passthrough.inside /mnt",
            folder,
            read_line,
            _WAITS_BETWEEN_LINES * request.timeout_s,
            files=(given,),
            guests=(bare_guest(X86_64).kernel, vfio_guest()),
            machines=machines,
        )
        about = json.loads((job / MACHINE).read_text())
    if machine.origin is not None:
        about["kernel_source"] = machine.origin
    found = [outcomes[number] for number in sorted(outcomes)]
    return to_json({**about, "seed": request.seed, "outcomes": found})


def machines_of(request: Request) -> tuple[int, int]:
    """Return the number of machines that share the proofs, and the bytes that they take."""
    extra_bytes = _HARDWARE_BYTES if request.has_selftests else 0
    machines = 1
    if len(request.only) > _FEW_PROOFS:
        processors, free_bytes = len(os.sched_getaffinity(0)), free_memory_bytes() - extra_bytes
        machines = machines_side_by_side(processors, free_bytes)
    return machines, machines * _MACHINE_BYTES + extra_bytes


def machines_side_by_side(processors: int, free_bytes: int) -> int:
    """Return 2 if there are processors and `free_bytes` of memory for two machines, else 1."""
    return max(1, min(2, processors, free_bytes // _MACHINE_BYTES))


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
