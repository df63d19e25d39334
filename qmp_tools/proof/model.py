"""One proof: what it depends on, and what came of it; `proof_run` carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..devices.device import ProofDevice
from ..guest.workload import Workload
from ..migration.migration import Limits, Progress
from ..migration.ways import LOCALHOST
from ..qemu.machine import Machine
from .late_dma import SETTLE_S
from .ram_map import RamMap
from .verdict import Verdict


@dataclass(frozen=True)
class Setup:
    """All that one proof depends on.

    `settle_s` is for how long the source's RAM must not change after its guest was paused, where
    the device keeps no journal and is not part of QEMU.
    """

    qemu: Path
    qemu_destination: Path
    machine: Machine
    guest: str
    workload: Workload
    device: ProofDevice
    seed: int
    way: str = "unix"
    host: str = LOCALHOST
    limits: Limits = field(default_factory=Limits)
    requests_after: int = 1000
    settle_s: float = SETTLE_S
    max_downtime_s: float | None = None


@dataclass(frozen=True)
class Hop:
    """One migration of several, in numbers: see `Proof`, `Verdict`, `Sharpness`, `GuestOutcome`."""

    seconds: float
    downtime_s: float | None
    pages: int
    lost: int
    rewritten: int
    certain: int
    unreported: int
    requests: int
    swept: int
    errors: int


@dataclass(frozen=True)
class Proof:
    """The verdict, and what happened on the way to it. Times in seconds.

    `moments` are those of the source's QMP events (CLOCK_MONOTONIC, ns; see `Migration`);
    `harvests` has dtype `dmaproof.evidence.HARVEST`; `commands` are the processes' command lines.
    """

    setup: Setup
    verdict: Verdict
    qemu_version: str
    qemu_destination_version: str
    boot_s: float
    migration_s: float
    compare_s: float
    downtime_s: float | None
    history: Sequence[Progress]
    moments: Mapping[str, int]
    harvests: NDArray[np.void]
    ram_map: RamMap
    commands: Mapping[str, Sequence[str]]
    folder: Path | None
    earlier: Sequence[Hop] = ()
    """The same guest's migrations before this one, all of them passes."""

    @property
    def hop(self) -> Hop:
        """What counts of this migration beside others."""
        sharpness, guest = self.verdict.sharpness, self.verdict.guest
        return Hop(
            seconds=self.migration_s,
            downtime_s=self.downtime_s,
            pages=self.verdict.pages,
            lost=len(self.verdict.lost),
            rewritten=sharpness.rewritten,
            certain=sharpness.certain,
            unreported=sharpness.unreported,
            requests=guest.requests,
            swept=guest.swept,
            errors=guest.errors,
        )
