"""Run a matrix: each cell is a ``dmaproof prove`` in its own process.

First, while nothing else runs, dmaproof prepares what the cells share: it builds guests, queries
the capabilities of QEMUs, and probes accelerators (a probe next to a dozen proofs could be wrong).
Then the cells run in parallel, as far as the machine's resources allow. A failure of one cell ends
only that cell. The end of the matrix ends all cells, and each cleans up as it does by itself.
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

from ..arch import find_architecture
from ..host.process import Process
from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..proof.model import Setup
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..qemu.choice import find_qemu
from ..qemu.program_files import ProgramFiles
from .axes import Cell, Matrix
from .resources import Resources
from .result import Result, State, result_of, skipped, untested
from .result_cache import ResultCache, key_of

_logger = logging.getLogger(__name__)

_WAITS_OF_A_PROOF: Final = 20
"""A proof bounds each of its waits, and this many of them may reach their bound. The resulting
limit is for a proof that does not end by itself, so a short ``--timeout`` does not shorten it."""


@dataclass(frozen=True)
class _Planned:
    """A cell, its set-up, and the key of its cached result."""

    cell: Cell
    setup: Setup
    key: str

    def command(self, seed: int) -> list[str]:
        """Return the command line of the cell, with `seed` unless the cell has its own seed."""
        options = self.setup.options
        return _command(options if "seed" in self.cell else replace(options, seed=seed))


def _command(options: ProofOptions) -> list[str]:
    return ["dmaproof", "prove", *options.words()]


async def run_matrix(
    matrix: Matrix, cache: ResultCache, resources: Resources, *, again: bool = False
) -> list[Result]:
    """Return the results of the matrix's cells, in their order; `again` ignores cached results.

    Raises:
        UsageError: the options of every cell are wrong, or the `cache` cannot be written to.
    """
    run = _Run(matrix, cache, resources)
    plan = await run.plan()
    results = {index: each for index, each in enumerate(plan) if isinstance(each, Result)}
    planned = {index: each for index, each in enumerate(plan) if isinstance(each, _Planned)}
    if not again:
        results |= run.find_cached(planned)
    for number, index in enumerate(sorted(results), 1):
        run.log(number, index, results[index])
    seed = random.SystemRandom().getrandbits(32)
    with run_folder() as folder:
        try:
            async with asyncio.TaskGroup() as group:
                for index, each in planned.items():
                    if index not in results:
                        group.create_task(run.fill(each, index, results, seed, folder))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return [results[index] for index in range(len(plan))]


class _Run:
    def __init__(self, matrix: Matrix, cache: ResultCache, resources: Resources) -> None:
        self._matrix = matrix
        self._cells = matrix.cells()
        self._cache = cache
        self._resources = resources

    def log(self, number: int, index: int, result: Result) -> None:
        """Log a line for the cell at `index`, the `number`th that is finished."""
        how = "cached" if result.cached else f"{result.seconds:.1f} s"
        name = self._matrix.label(self._cells[index])
        line = f"{number}/{len(self._cells)}  {name}  {result.short} ({how})"
        if result.state not in (State.CLEAN, State.SKIPPED):
            line += f": {result.message.splitlines()[0]}"
        _logger.info("%s", line)

    async def plan(self) -> list[_Planned | Result]:
        """Return the plan for each cell, or its result if the cell cannot be carried out.

        Raises:
            UsageError: the options of every cell are wrong.
        """
        architectures = self._matrix.axes.get("arch", (None,))
        for name in ("qemu", "qemu-destination"):
            for value in self._matrix.axes.get(name, ()):
                for architecture in architectures:
                    find_qemu(value, find_architecture(architecture))
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
        if wrong is not None and not any(isinstance(each, _Planned) for each in found):
            raise wrong
        return found

    def find_cached(self, planned: Mapping[int, _Planned]) -> dict[int, Result]:
        """Return the results of earlier runs that are still valid."""
        found = {}
        for index, each in planned.items():
            if content := self._cache.find(each.cell, each.key):
                result = result_of(content["report"], content["seconds"])
                command = each.command(result.seed or 0)
                found[index] = replace(result, command=command, cached=True)
        return found

    async def fill(
        self, planned: _Planned, index: int, results: dict[int, Result], seed: int, folder: Path
    ) -> None:
        """Carry out one cell, as soon as its resources are free."""
        try:
            async with self._resources.reserve(planned.setup):
                result = await self._prove(planned, seed, folder / str(index))
        except UntestableError as error:
            result = untested(str(error))
        results[index] = replace(result, command=planned.command(seed))
        self.log(len(results), index, result)

    async def _prove(self, planned: _Planned, seed: int, base: Path) -> Result:
        began_s = time.monotonic()
        answer, log = base.with_suffix(".json"), base.with_suffix(".log")
        program = [sys.executable, "-m", "qmp_tools.cli", *planned.command(seed)[1:]]
        limit_s = _WAITS_OF_A_PROOF * max(planned.setup.limits.timeout_s, DEFAULT_TIMEOUT_S)
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
        if result.state != State.UNTESTED:  # the cause may be temporary: the next run tries again
            self._cache.store(planned.cell, planned.key, report, seconds)
        return replace(result, seconds=seconds)


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
