"""Carry out the measurement in L1, and make the fit and the projection from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...host.run_folder import run_folder
from ..l1.machine import L1, run_in_l1
from .measure import Pinned, Row
from .model import Fit, Projection, fits, nanoseconds, project
from .yardsticks import yardsticks

_logger = logging.getLogger(__name__)

_RESULTS: Final = "results.json"
_TIMES: Final = 10
_COMMAND: Final = f"python3 -m qmp_tools.passthrough.kernel_cost.measure /mnt/{_RESULTS} --most "


@dataclass(frozen=True)
class KernelCost:
    """The whole measurement; `counted` has the yardsticks in L1, `timed` those on the host."""

    kernel: str
    rows: Sequence[Row]
    counted: Mapping[str, float]
    timed: Mapping[str, float]
    fits: Mapping[str, Fit]
    projections: Sequence[Projection]

    @property
    def nanoseconds(self) -> dict[str, float]:
        """The nanoseconds of an instruction, by yardstick."""
        return nanoseconds(self.timed, self.counted)

    def to_json(self) -> dict[str, Any]:
        """Return the whole measurement as for JSON."""
        times = self.nanoseconds
        return {
            "kernel": self.kernel,
            "rows": [asdict(row) for row in self.rows],
            "yardsticks": {
                name: {"instructions": self.counted[name], "nanoseconds": self.timed[name]}
                for name in self.timed
            },
            "fits": [asdict(fit) for fit in self.fits.values()],
            "projections": [
                {
                    **asdict(projection),
                    "instructions": projection.instructions,
                    "milliseconds": projection.milliseconds(times),
                }
                for projection in self.projections
            ],
        }


async def measure_kernel_cost(machine: L1, qemu: Path, most: int, timeout_s: float) -> KernelCost:
    """Measure guests up to `most` bytes in L1, booted by `qemu`.

    Up to 16 TiB the measurement takes 2 minutes on an idle host.

    Raises:
        UntestableError: L1 does not boot, or ends early.
    """

    def log_row(line: str) -> None:
        _logger.info("%s", line.replace("\t", "  "))

    with run_folder(keep=False) as folder:
        counting = replace(machine, counting=True)
        job = await run_in_l1(counting, qemu, f"{_COMMAND}{most}", folder, log_row, timeout_s)
        results: dict[str, Any] = json.loads((job / _RESULTS).read_text())
    return evaluate(results, _timed())


def _timed() -> dict[str, float]:
    """Time the yardsticks on the host; return the shortest times, as the host may be busy."""
    runs = [yardsticks() for _ in range(_TIMES)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def evaluate(results: Mapping[str, Any], timed: Mapping[str, float]) -> KernelCost:
    """Fit the model to the results from L1, and project it with the yardsticks `timed` here."""
    rows = [Row(**{**row, "pinned": Pinned(**row["pinned"])}) for row in results["rows"]]
    found = fits(rows)
    projections = list(project(rows, found))
    return KernelCost(results["kernel"], rows, results["yardsticks"], timed, found, projections)
