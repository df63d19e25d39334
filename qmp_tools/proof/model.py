"""The set-up and the outcome of one proof; `proof_run` carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..devices.device import ProofDevice
from ..guest.workload import Workload
from ..migration.migration import Limits, Migration, Progress
from ..migration.state_refusal import StateRefusal
from ..qemu.machine import Machine
from .options import ProofOptions
from .ram_map import RamMap
from .verdict import Verdict


@dataclass(frozen=True)
class Setup:
    """All that one proof depends on: its `options`, and what they resolve to on this machine.

    The options contain the chosen seed, accelerator and RAM size, so that they repeat the proof.
    """

    options: ProofOptions
    qemu: Path
    qemu_destination: Path
    machine: Machine
    guest: str
    workload: Workload
    device: ProofDevice
    guest_kernel: str | None = None

    @property
    def guest_text(self) -> str:
        """The guest's name, and its kernel's version and origin if the guest has one."""
        return f"{self.guest} {self.guest_kernel or ''}".rstrip()

    @property
    def direct(self) -> bool:
        """Whether the device writes to the pages of the guest's program themselves."""
        return self.device.direct or self.guest == "bare"

    @property
    def seed(self) -> int:
        """The seed of the random choices of workload, device and fault."""
        return self.options.seed or 0

    @property
    def scenario(self) -> str:
        """The name of the migration scenario."""
        return self.options.scenario

    @property
    def host(self) -> str:
        """The address at which the destination listens in scenarios over TCP."""
        return self.options.host

    @property
    def limits(self) -> Limits:
        """The bandwidth and downtime limits of the migration, and the bound of each wait."""
        return self.options.limits

    @property
    def requests_after(self) -> int:
        """The number of requests that the guest must do on the destination."""
        return self.options.requests_after

    @property
    def settle_s(self) -> float:
        """The seconds for which the source's RAM must not change after its guest was paused.

        This applies to a device outside QEMU that keeps no journal.
        """
        return self.options.settle

    @property
    def max_downtime_s(self) -> float | None:
        """The longest downtime that passes; None if any downtime passes."""
        return self.options.max_downtime


@dataclass(frozen=True)
class Migrated:
    """The state of a migration once it is over and both guests are paused.

    `refusal` is set if the destination refused a device's state, which ended the migration.
    `untested` is the reason if the scenario has not tested enough.
    """

    versions: Sequence[str]
    migration_s: float
    all_sent_ns: int
    ended_early: bool
    migration: Migration
    refusal: StateRefusal | None = None
    untested: str | None = None

    @property
    def source_continued(self) -> bool:
        """Whether the source's guest has run since the end of the migration."""
        return self.refusal is not None and self.refusal.source_continued

    @property
    def ram_is_comparable(self) -> bool:
        """Whether RAM that differs has been lost."""
        return self.refusal is None or (
            self.refusal.has_all_pages and not self.refusal.source_continued
        )


@dataclass(frozen=True)
class MigrationSummary:
    """The figures of one migration: see `Proof`, `Verdict`, `Sensitivity` and `GuestOutcome`."""

    seconds: float
    downtime_s: float | None
    pages: int
    lost: int
    rewritten: int
    guaranteed_detectable: int
    unreported: int
    requests: int
    rechecked: int
    errors: int


@dataclass(frozen=True)
class Proof:
    """The verdict of a proof, and a record of the run. Times in seconds.

    `moments` are the times of the source's QMP events (CLOCK_MONOTONIC, ns; see `Migration`).
    `harvests` has dtype `dmaproof.evidence.HARVEST`. `commands` are the processes' command lines.
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
    earlier: Sequence[MigrationSummary] = ()
    """The earlier migrations of the same guest, all of which passed."""

    @property
    def migration_summary(self) -> MigrationSummary:
        """The figures of this migration."""
        sensitivity, guest = self.verdict.sensitivity, self.verdict.guest
        return MigrationSummary(
            seconds=self.migration_s,
            downtime_s=self.downtime_s,
            pages=self.verdict.pages,
            lost=len(self.verdict.lost),
            rewritten=sensitivity.rewritten,
            guaranteed_detectable=sensitivity.guaranteed_detectable,
            unreported=sensitivity.unreported,
            requests=guest.requests,
            rechecked=guest.rechecked,
            errors=guest.errors,
        )
