"""Runs a matrix: each cell is a ``dmaproof prove`` in a process of its own.

What the cells share is done once and beforehand, while nothing else runs: guests are built, QEMUs
are asked what they have, accelerators are probed (a probe beside a dozen proofs could be wrong).
Then the cells run side by side as far as there is room. Whatever happens to one of them ends it
alone; what ends the matrix ends them all, and each cleans up as it would by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UnsupportedError, UntestableError, UsageError

from ..host.process import Process
from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..proof.model import Setup
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..qemu.choice import find_qemu
from ..qemu.program_files import ProgramFiles
from .axes import Cell, Matrix
from .resources import Room
from .result import Result, State, result_of, skipped, untested
from .result_cache import Kept, key_of

_logger = logging.getLogger(__name__)

_WAITS_OF_A_PROOF: Final = 20
"""So many waits, each of which it bounds itself, a proof may take to their bounds. This is for one
that does not end by itself, so a short ``--timeout`` does not make it shorter."""


@dataclass(frozen=True)
class _Planned:
    """A cell, what it comes to, and under which key its result is kept."""

    cell: Cell
    setup: Setup
    key: str

    def command(self, seed: int) -> list[str]:
        """What carries the cell out, with `seed` where it has none of its own."""
        options = self.setup.options
        return _command(options if "seed" in self.cell else replace(options, seed=seed))


def _command(options: ProofOptions) -> list[str]:
    return ["dmaproof", "prove", *options.words()]


async def run_matrix(
    matrix: Matrix, kept: Kept, room: Room, *, again: bool = False
) -> list[Result]:
    """The results of the matrix' cells, in their order; with `again` none is taken from `kept`.

    Raises:
        UsageError: no cell can be what its options say, or `kept` cannot be written to.
    """
    run = _Run(matrix, kept, room)
    plan = await run.plan()
    results = {index: it for index, it in enumerate(plan) if isinstance(it, Result)}
    planned = {index: it for index, it in enumerate(plan) if isinstance(it, _Planned)}
    if not again:
        results |= run.find_kept(planned)
    for number, index in enumerate(sorted(results), 1):
        run.tell(number, index, results[index])
    seed = random.SystemRandom().getrandbits(32)
    with run_folder() as folder:
        try:
            async with asyncio.TaskGroup() as group:
                for index, it in planned.items():
                    if index not in results:
                        group.create_task(run.fill(it, index, results, seed, folder))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return [results[index] for index in range(len(plan))]


class _Run:
    def __init__(self, matrix: Matrix, kept: Kept, room: Room) -> None:
        self._matrix = matrix
        self._cells = matrix.cells()
        self._kept = kept
        self._room = room

    def tell(self, number: int, index: int, result: Result) -> None:
        """A line for the cell at `index`, the `number`th that is finished."""
        how = "kept" if result.kept else f"{result.seconds:.1f} s"
        name = self._matrix.label(self._cells[index])
        line = f"{number}/{len(self._cells)}  {name}  {result.short} ({how})"
        if result.state not in (State.CLEAN, State.SKIPPED):
            line += f": {result.message.splitlines()[0]}"
        _logger.info("%s", line)

    async def plan(self) -> list[_Planned | Result]:
        """What each cell comes to; a result where it cannot be carried out.

        Raises:
            UsageError: none of them can be what it is asked to be.
        """
        for name in ("qemu", "qemu-destination"):
            for value in self._matrix.axes.get(name, ()):
                find_qemu(value)
        files = ProgramFiles()
        found: list[_Planned | Result] = []
        wrong: UsageError | None = None
        for cell in self._cells:
            options = ProofOptions.of(cell)
            try:
                setup = await resolve(options)
                found.append(_Planned(cell, setup, key_of(cell, setup, files)))
            except (UntestableError, UsageError) as error:
                wrong = error if isinstance(error, UsageError) else wrong
                outcome = skipped if isinstance(error, UnsupportedError) else untested
                found.append(replace(outcome(str(error)), command=_command(options)))
        if wrong is not None and not any(isinstance(it, _Planned) for it in found):
            raise wrong
        return found

    def find_kept(self, planned: Mapping[int, _Planned]) -> dict[int, Result]:
        """The results of an earlier run that still count."""
        found = {}
        for index, it in planned.items():
            if content := self._kept.find(it.cell, it.key):
                result = result_of(content["report"], content["seconds"])
                found[index] = replace(result, command=it.command(result.seed or 0), kept=True)
        return found

    async def fill(
        self, it: _Planned, index: int, results: dict[int, Result], seed: int, folder: Path
    ) -> None:
        """Carry out one cell, as soon as there is room for it."""
        try:
            async with self._room.take(it.setup):
                result = await self._prove(it, seed, folder / str(index))
        except UntestableError as error:
            result = untested(str(error))
        results[index] = replace(result, command=it.command(seed))
        self.tell(len(results), index, result)

    async def _prove(self, it: _Planned, seed: int, base: Path) -> Result:
        began_s = time.monotonic()
        answer, log = base.with_suffix(".json"), base.with_suffix(".log")
        program = [sys.executable, "-m", "qmp_tools.cli", *it.command(seed)[1:]]
        limit_s = _WAITS_OF_A_PROOF * max(it.setup.limits.timeout_s, DEFAULT_TIMEOUT_S)
        async with _ended(
            await Process.start("proof", [*program, "--quiet", f"--json={answer}"], log)
        ) as process:
            try:
                await asyncio.wait_for(asyncio.shield(process.died), limit_s)
            except TimeoutError:
                return untested(f"the proof has not ended within {limit_s:g} s")
        seconds = time.monotonic() - began_s
        report = _read(answer)
        if report is None:
            return untested(f"the proof {process.how_it_ended()}\n{process.log_tail()}".rstrip())
        result = result_of(report, seconds)
        if result.state != State.UNTESTED:  # that may be the moment's fault, so it is tried again
            self._kept.keep(it.cell, it.key, report, seconds)
        return replace(result, seconds=seconds)


@contextlib.asynccontextmanager
async def _ended(process: Process) -> AsyncIterator[Process]:
    try:
        yield process
    finally:
        await process.end()


def _read(answer: Path) -> dict[str, Any] | None:
    """The report in a file; None where the proof has not come to writing it."""
    try:
        report: dict[str, Any] = json.loads(answer.read_text())
    except (OSError, ValueError):
        return None
    return report
