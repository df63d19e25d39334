"""The cells of a matrix that need L1: proofs of the passthrough route, and proofs in L1.

All proofs of the passthrough route on one kernel and one QEMU run in the same machines, so a batch
of them boots L1 only once. Each outcome is kept as soon as the proof has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Final, cast

from dmaproof.errors import UsageError

from ..arch.x86_64 import X86_64
from ..guest.bare import bare_guest, vfio_guest
from ..matrix.cells import Axis, Cell, CellKind, PlannedCell, Report, Run
from ..matrix.proof_cells import PlannedProof, ProofCells
from ..matrix.result import Result, State
from ..matrix.result_cache import key_of_parts
from ..proof.options import OPTIONS, ProofOptions
from ..qemu.choice import find_qemu
from ..qemu.machine import MIB
from ..qemu.program_files import ProgramFiles
from .catalog import Request, own_proofs, select
from .l1.host_qemu import tested_qemu_folder
from .l1.kernel import DEFAULT_KERNEL
from .l1.machine import L1, l1
from .nested import nested_options, runs_in_l1
from .outcome import State as Outcome
from .prove import machines_of, prove_passthrough

_AXIS: Final = "passthrough"
_STATES: Final = {
    Outcome.HOLDS: State.CLEAN,
    Outcome.FAILS: State.FAILED,
    Outcome.NOT_SUPPORTED: State.SKIPPED,
    Outcome.UNTESTED: State.UNTESTED,
}
_NESTED_PROOF_BYTES: Final = 2560 * MIB
"""The memory of an L1 that carries out one proof, with its QEMU."""


def _machine_of(kernel: str | None, qemu: str | None) -> L1:
    """Return the L1 with this kernel whose L2 runs on this QEMU; builds it if necessary.

    Each call locks L1's parts in the cache until this process ends, so cells share the result.
    """
    machine = l1(kernel or DEFAULT_KERNEL)
    return machine if qemu is None else replace(machine, qemu=tested_qemu_folder(qemu))


def _parts_of(machine: L1, files: ProgramFiles) -> dict[str, Any]:
    """Return what the result of a proof in this L1 depends on."""
    tested = machine.qemu and machine.qemu / X86_64.qemu_program
    return {
        "qemu": [files.contents([qemu]) for qemu in (find_qemu(None, X86_64), tested) if qemu],
        "guest": files.contents([bare_guest(X86_64).kernel, vfio_guest()]),
        # The names contain digests of what these folders were made of.
        "l1": [folder.name for folder in (machine.root, machine.kernel, machine.module.parent)],
    }


class NestedProofCells(ProofCells):
    """The proofs with a device that this machine does not have."""

    name = "nested-proof"

    def __init__(self) -> None:
        self._machine_of = cache(_machine_of)

    def claims(self, cell: Cell) -> bool:
        """Return whether the device of the cell runs in L1."""
        return _AXIS not in cell and runs_in_l1(ProofOptions.of(cell))

    async def plan(self, cell: Cell, files: ProgramFiles) -> PlannedProof:
        """Check the options, and build L1 if it is not in the cache."""
        options = ProofOptions.of(cell)
        nested_options(options)
        machine = self._machine_of(options.l1_kernel, cell.get("qemu"))
        key = key_of_parts(cell, _parts_of(machine, files))
        return PlannedProof(cell, key, options, 2, _NESTED_PROOF_BYTES)


@dataclass(frozen=True)
class _PlannedOutcome(PlannedCell):
    """A cell that is a proof of the passthrough route."""

    machine: L1
    timeout_s: float

    def command(self, seed: int) -> list[str]:
        """Return the command line of the proof alone."""
        return [*_command(self.cell), f"--seed={self.cell.get('seed', seed)}"]


def _command(cell: Cell) -> list[str]:
    words = {"l1-kernel": "kernel", "qemu": "qemu", "timeout": "timeout"}
    given = [f"--{word}={cell[name]}" for name, word in words.items() if name in cell]
    return ["dmaproof", "passthrough", *given, f"--only={cell[_AXIS]}"]


class PassthroughCells(CellKind):
    """The proofs of the passthrough route."""

    name = "passthrough"
    axis: ClassVar = Axis(
        _AXIS,
        "proofs of VFIO in the nested machine, by group or name, such as rules (default: none)",
        own_proofs,
        lambda value: select([value]),
    )
    _accepts: ClassVar = (_AXIS, "qemu", "l1-kernel", "seed", "timeout")

    def __init__(self) -> None:
        self._machine_of = cache(_machine_of)

    def claims(self, cell: Cell) -> bool:
        """Return whether the cell names such a proof."""
        return _AXIS in cell

    async def plan(self, cell: Cell, files: ProgramFiles) -> PlannedCell:
        """Check the options, and build L1 if it is not in the cache."""
        for name in cell:
            if name not in self._accepts:
                raise UsageError(
                    f"{OPTIONS[name.replace('-', '_')].flag} does not apply to the passthrough "
                    f"proof {cell[_AXIS]!r}; expected only {', '.join(self._accepts[1:])}"
                )
        options = ProofOptions.of({name: cell[name] for name in cell if name != _AXIS})
        machine = self._machine_of(options.l1_kernel, cell.get("qemu"))
        key = key_of_parts(cell, _parts_of(machine, files))
        return _PlannedOutcome(cell, key, machine, options.timeout)

    def command(self, cell: Cell) -> list[str]:
        """Return the command line of the proof alone."""
        return _command(cell)

    def batches(self, planned: Sequence[PlannedCell]) -> list[Sequence[PlannedCell]]:
        """Return the cells that share a machine, a seed and a timeout."""
        found: dict[object, list[PlannedCell]] = {}
        for each in cast(Sequence[_PlannedOutcome], planned):
            found.setdefault((each.machine, each.timeout_s, each.cell.get("seed")), []).append(each)
        return list(found.values())

    async def carry_out(self, batch: Sequence[PlannedCell], run: Run) -> None:
        """Boot L1 for the whole batch, and finish each cell when its proof has ended."""
        cells = {each.cell[_AXIS]: each for each in batch}
        first = cast(_PlannedOutcome, batch[0])
        request = Request(
            seed=int(first.cell.get("seed", run.seed % (1 << 16))),
            only=tuple(cells),
            timeout_s=first.timeout_s,
        )

        def finish(outcome: dict[str, Any]) -> None:
            name = f"{outcome['group']}: {outcome['name']}"
            run.finish(cells[name], {"outcome": outcome}, outcome["seconds"])

        async with run.resources.reserve(*machines_of(request)):
            await prove_passthrough(
                *(first.machine, find_qemu(None, X86_64), request), on_outcome=finish
            )

    def result(self, report: Report, seconds: float) -> Result:
        """Return the result of the proof."""
        outcome: Mapping[str, Any] = report["outcome"]
        return Result(_STATES[Outcome(outcome["state"])], outcome["found"], seconds=seconds)
