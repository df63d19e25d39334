"""The cells that are proofs: each is a ``dmaproof prove`` in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from ..host.process import Process
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..proof.model import Setup
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..qemu.machine import MIB
from ..qemu.program_files import ProgramFiles
from .cells import Cell, CellKind, PlannedCell, Report, Run
from .result import Result, result_of, untested
from .result_cache import key_of

_WAITS_OF_A_PROOF: Final = 20
"""A proof bounds each of its waits, and this many of them may reach their bound. The resulting
limit is for a proof that does not end by itself, so a short ``--timeout`` does not shorten it."""
_OVERHEAD_BYTES: Final = 400 * MIB
"""What a proof needs in addition to its guests' RAM: two QEMUs, the device and the tool."""


@dataclass(frozen=True)
class PlannedProof(PlannedCell):
    """A cell that is a proof with these `options`, which names the accelerator and the memory."""

    options: ProofOptions
    processors: int
    """At any time, the vCPUs of one side and the device are busy."""
    memory_bytes: int

    def command(self, seed: int) -> list[str]:
        """Return the command line of the cell, with `seed` unless the cell has its own seed."""
        options = self.options if "seed" in self.cell else replace(self.options, seed=seed)
        return ["dmaproof", "prove", *options.words()]


class ProofCells(CellKind):
    """The cells that no other kind claims."""

    name = "proof"

    def claims(self, cell: Cell) -> bool:
        """Return False: a cell of another kind is claimed by that kind."""
        return False

    async def plan(self, cell: Cell, files: ProgramFiles) -> PlannedProof:
        """Resolve the options of the cell."""
        setup = await resolve(ProofOptions.of(cell))
        return PlannedProof(
            cell,
            key_of(cell, setup, files),
            setup.options,
            processors=setup.machine.cpus + 1,
            memory_bytes=memory_of(setup),
        )

    def command(self, cell: Cell) -> list[str]:
        """Return the command line of a proof with the options of the cell."""
        return ["dmaproof", "prove", *ProofOptions.of(cell).words()]

    async def carry_out(self, batch: Sequence[PlannedCell], run: Run) -> None:
        """Run the command of the cell."""
        for planned in cast(Sequence[PlannedProof], batch):
            async with run.resources.reserve(planned.processors, planned.memory_bytes):
                began_s = time.monotonic()
                found = await _prove(planned, run)
            run.finish(planned, found, time.monotonic() - began_s)

    def result(self, report: Report, seconds: float) -> Result:
        """Return the result of the proof."""
        return result_of(report, seconds)


def memory_of(setup: Setup) -> int:
    """Return the bytes of memory that a proof needs."""
    return 2 * setup.machine.most_memory_bytes + _OVERHEAD_BYTES


async def _prove(planned: PlannedProof, run: Run) -> Report | Result:
    base = run.folder / str(abs(hash(planned.key)))
    answer, log = base.with_suffix(".json"), base.with_suffix(".log")
    program = [sys.executable, "-m", "qmp_tools.cli", *planned.command(run.seed)[1:]]
    limit_s = _WAITS_OF_A_PROOF * max(planned.options.timeout, DEFAULT_TIMEOUT_S)
    async with _ended(
        await Process.start("proof", [*program, "--quiet", f"--json={answer}"], log)
    ) as process:
        try:
            await asyncio.wait_for(asyncio.shield(process.died), limit_s)
        except TimeoutError:
            return untested(f"the proof has not ended within {limit_s:g} s")
    report = _read(answer)
    if report is None:
        return untested(f"the proof {process.how_it_ended()}\n{process.log_tail()}".rstrip())
    return report


@contextlib.asynccontextmanager
async def _ended(process: Process) -> AsyncIterator[Process]:
    try:
        yield process
    finally:
        await process.end()


def _read(answer: Path) -> dict[str, Any] | None:
    """Return the report in a file; None if the proof has not written it."""
    try:
        report: dict[str, Any] = json.loads(answer.read_text())
    except (OSError, ValueError):
        return None
    return report
