"""Run a matrix: plan its cells, take the cached results, and carry out the others.

First, while nothing else runs, dmaproof prepares what the cells share: it builds guests, queries
the capabilities of QEMUs, and probes accelerators (a probe next to a dozen proofs could be wrong).
Then the cells run in parallel, as far as the machine's resources allow. A failure of one cell ends
only that cell. The end of the matrix ends all cells, and each cleans up as it does by itself.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import replace

from dmaproof.errors import UnsupportedError, UntestableError, UsageError

from ..arch import find_architecture
from ..host.run_folder import run_folder
from ..qemu.choice import find_qemu
from ..qemu.program_files import ProgramFiles
from .axes import Matrix
from .cells import Cell, CellKind, Finish, PlannedCell, Report, Run, cell_kinds
from .proof_cells import ProofCells
from .resources import Resources
from .result import Result, State, skipped, untested
from .result_cache import ResultCache

_logger = logging.getLogger(__name__)


async def run_matrix(
    matrix: Matrix, cache: ResultCache, resources: Resources, *, again: bool = False
) -> list[Result]:
    """Return the results of the matrix's cells, in their order; `again` ignores cached results.

    Raises:
        UsageError: the options of every cell are wrong, or the `cache` cannot be written to.
    """
    run = _Run(matrix, cache)
    await run.plan()
    if not again:
        run.find_cached()
    seed = random.SystemRandom().getrandbits(32)
    with run_folder() as folder:
        work = Run(resources, seed, folder, run.finish(seed))
        try:
            async with asyncio.TaskGroup() as group:
                for kind, batch in run.batches():
                    group.create_task(run.carry_out(kind, batch, work))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return run.results()


class _Run:
    """The cells of one matrix: each is planned or has a result."""

    def __init__(self, matrix: Matrix, cache: ResultCache) -> None:
        self._matrix = matrix
        self._cells = matrix.cells()
        self._cache = cache
        self._kinds = {name: kind() for name, kind in cell_kinds().usable().items()}
        self._planned: dict[int, tuple[CellKind, PlannedCell]] = {}
        self._results: dict[int, Result] = {}

    def results(self) -> list[Result]:
        """Return the results of all cells, in their order."""
        return [self._results[index] for index in range(len(self._cells))]

    async def plan(self) -> None:
        """Plan each cell; one that cannot be carried out has a result at once.

        Raises:
            UsageError: the options of every cell are wrong.
        """
        proofs = [cell for cell in self._cells if self._kind_of(cell).name == ProofCells.name]
        for qemu, architecture in dict.fromkeys(
            (cell[name], cell.get("arch"))
            for cell in proofs
            for name in ("qemu", "qemu-destination")
            if name in cell
        ):
            find_qemu(qemu, find_architecture(architecture))
        files = ProgramFiles()
        wrong: UsageError | None = None
        for index, cell in enumerate(self._cells):
            kind = self._kind_of(cell)
            try:
                self._planned[index] = (kind, await kind.plan(cell, files))
            except (UntestableError, UsageError) as error:
                wrong = error if isinstance(error, UsageError) else wrong
                outcome = skipped if isinstance(error, UnsupportedError) else untested
                self._end(index, replace(outcome(str(error)), command=kind.command(cell)))
        if wrong is not None and not self._planned:
            raise wrong

    def _kind_of(self, cell: Cell) -> CellKind:
        claiming = (kind for kind in self._kinds.values() if kind.claims(cell))
        return next(claiming, self._kinds[ProofCells.name])

    def find_cached(self) -> None:
        """Take the results of earlier runs that are still valid."""
        for index, (kind, planned) in self._planned.items():
            if content := self._cache.find(planned.cell, planned.key):
                result = kind.result(content["report"], content["seconds"])
                command = planned.command(result.seed or 0)
                self._end(index, replace(result, command=command, cached=True))

    def batches(self) -> list[tuple[CellKind, Sequence[PlannedCell]]]:
        """Return the cells without a result as the batches of their kinds."""
        waiting: dict[CellKind, list[PlannedCell]] = {}
        for index, (kind, planned) in self._planned.items():
            if index not in self._results:
                waiting.setdefault(kind, []).append(planned)
        return [(kind, batch) for kind, cells in waiting.items() for batch in kind.batches(cells)]

    async def carry_out(self, kind: CellKind, batch: Sequence[PlannedCell], work: Run) -> None:
        """Carry out a batch; a cell that it does not finish is untested."""
        try:
            await kind.carry_out(batch, work)
        except UntestableError as error:
            for planned in batch:
                if self._index_of(planned) not in self._results:
                    work.finish(planned, untested(str(error)), 0.0)

    def finish(self, seed: int) -> Finish:
        """Return the function that takes the report of a cell, or its result."""

        def finish(planned: PlannedCell, found: Report | Result, seconds: float) -> None:
            index = self._index_of(planned)
            if isinstance(found, Result):
                result = found
            else:
                kind, _ = self._planned[index]
                result = kind.result(found, seconds)
                # The cause of an untested cell may be temporary: the next run tries again.
                if result.state != State.UNTESTED:
                    self._cache.store(planned.cell, planned.key, found, seconds)
            self._end(index, replace(result, seconds=seconds, command=planned.command(seed)))

        return finish

    def _index_of(self, planned: PlannedCell) -> int:
        return next(index for index, (_, each) in self._planned.items() if each is planned)

    def _end(self, index: int, result: Result) -> None:
        """Note the result of the cell at `index`, and log a line for it."""
        self._results[index] = result
        how = "cached" if result.cached else f"{result.seconds:.1f} s"
        name = self._matrix.label(self._cells[index])
        line = f"{len(self._results)}/{len(self._cells)}  {name}  {result.short} ({how})"
        if result.state not in (State.CLEAN, State.SKIPPED):
            line += f": {result.message.splitlines()[0]}"
        _logger.info("%s", line)
