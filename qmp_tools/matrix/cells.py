"""The kinds of cells of a matrix: how the cells of each kind are planned and carried out.

Most cells are proofs (`proof_cells`). Another distribution declares a kind as an entry point of the
group ``dmaproof.cell_kinds``, whose value is a subclass of `CellKind`. So does dmaproof itself for
kinds outside this package.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from dmaproof.discovery import Registry

from ..qemu.program_files import ProgramFiles
from .resources import Resources
from .result import Result

Cell: TypeAlias = Mapping[str, str]
"""The options of one cell by name, in the order of the matrix."""

Report: TypeAlias = Mapping[str, Any]
"""The report of a cell, as JSON has it and as the result cache keeps it."""


@dataclass(frozen=True)
class Axis:
    """An axis besides the options of a proof, which only cells of one kind have."""

    name: str
    help: str
    values: Callable[[], Sequence[str]]
    """Returns all values of the axis."""
    select: Callable[[str], Sequence[str]]
    """Returns the values that a name or a pattern selects; raises UsageError if there are none."""


@dataclass(frozen=True)
class PlannedCell(ABC):
    """A cell that can be carried out, and the key of its cached result."""

    cell: Cell
    key: str

    @abstractmethod
    def command(self, seed: int) -> list[str]:
        """Return the command line of the cell, with `seed` unless the cell has its own seed."""


Finish: TypeAlias = Callable[[PlannedCell, Report | Result, float], None]
"""Takes the report of a cell, or its result if it has no report, and the seconds that it took."""


@dataclass(frozen=True)
class Run:
    """What carries out cells: the resources of the machine, a seed, and a folder for files."""

    resources: Resources
    seed: int
    folder: Path
    finish: Finish


class CellKind(ABC):
    """One kind of cells. One instance serves a whole matrix."""

    name: ClassVar[str]
    axis: ClassVar[Axis | None] = None

    @abstractmethod
    def claims(self, cell: Cell) -> bool:
        """Return whether the cell is of this kind."""

    @abstractmethod
    async def plan(self, cell: Cell, files: ProgramFiles) -> PlannedCell:
        """Plan a cell, and prepare what the cells share.

        Raises:
            UsageError: the options of the cell are wrong.
            UntestableError: the cell cannot be carried out.
        """

    @abstractmethod
    def command(self, cell: Cell) -> list[str]:
        """Return the command line of a cell that cannot be planned."""

    def batches(self, planned: Sequence[PlannedCell]) -> list[Sequence[PlannedCell]]:
        """Return the cells that are carried out together; by default each one alone."""
        return [[each] for each in planned]

    @abstractmethod
    async def carry_out(self, batch: Sequence[PlannedCell], run: Run) -> None:
        """Carry out a batch as soon as its resources are free, and finish each of its cells.

        Raises:
            UntestableError: the cells that are not finished cannot be carried out.
        """

    @abstractmethod
    def result(self, report: Report, seconds: float) -> Result:
        """Return the result in the report of a cell that took `seconds`."""


@cache
def cell_kinds() -> Registry[CellKind]:
    """Find the kinds of cells: proofs, and those of entry points.

    Returns:
        The classes by name.
    """
    return Registry("cell kind", CellKind, sys.modules[__package__])


@cache
def extra_axes() -> dict[str, Axis]:
    """Return the axes besides the options of a proof, by name."""
    axes = (kind.axis for kind in cell_kinds().usable().values())
    return {axis.name: axis for axis in axes if axis is not None}
