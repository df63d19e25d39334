"""The base class of migration scenarios: the steps of a proof's migration, and rules to judge it.

The defaults are those of a live precopy migration, held until the proof is sensitive enough. A
scenario overrides what is different, in a file of this package, or in any other package by the
entry-point group ``dmaproof.scenarios``::

    class Precious(Scenario):
        name = "precious"
        summary = "The source and destination use a link that loses nothing"
        capabilities = ("return-path",)

The steps, in order: `start`, then for each migration `first_attempt`, `prepare`, `migrate` and
`finish`; between two migrations `start_return`. The caller guards each step against the death of a
process (`QemuPair.guarded`), except `start` and `start_return`, which guard their own parts. The
caller compares the guests between `migrate` and `finish`, by the scenario's rules.

Each proof makes its own scenario, so a step may keep in `self` what a later step needs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError, UsageError

from ...devices.device import ProofDevice
from ...guest.channel import QUIET, START_LAST, START_WRITE_ONCE
from ...guest.drivers import LinuxNeeds
from ...memory.ram import RamFile, compare
from ...qemu.machine import Hardware
from ...qemu.memory_backend import MemoryBackend
from ...qemu.qemu import Qemu
from ..attempt import Attempt
from ..hold import PrecopyHold
from ..judgement import Blame, EvidenceSource
from ..migration import Progress
from ..pair import QemuPair
from ..procedure import Procedure

_logger = logging.getLogger(__name__)

_STEPS: Final = ("start", "first_attempt", "prepare", "migrate", "amid_precopy", "start_return")
"""The steps before the guest continues; all of them need a proof's processes."""


class Scenario(Procedure):
    """How a guest migrates; `Procedure` has the QMP commands.

    `name` is the scenario's name on the command line and in reports, `summary` a sentence about it.
    The guest migrates `migrations` times, to the destination and back. The machine has the `added`
    hardware. If the scenario has `linux_needs`, only a Linux guest can migrate. The scenario plugs
    the devices if it `plugs_devices`. The guest initialises its device again while QEMU logs if the
    scenario `resets`. If `destination_runs`, the destination's guest runs while pages arrive, and
    is paused for the comparison. If QEMU `skips_free_pages`, it does not send pages that the guest
    says are free. If it `sends_whole_pages`, a huge page arrives whole if any bit of it is set.
    """

    name: str
    summary: str
    migrations: int = 1
    added: Hardware = Hardware()
    linux_needs: LinuxNeeds | None = None
    plugs_devices: bool = False
    destination_runs: bool = False
    resets: bool = False
    skips_free_pages: bool = False
    sends_whole_pages: bool = False

    # The steps ------------------------------------------------------------------------------------

    async def start(self, pair: QemuPair) -> None:
        """Start the QEMUs, and wait until the source's guest is ready.

        Raises:
            UntestableError: a QEMU could not be started, or the guest does not become ready.
        """
        await pair.guarded(pair.start_both())
        await pair.guarded(pair.boot())

    async def first_attempt(self, attempt: Attempt) -> None:
        """Carry out a migration that fails, before the migration that is proved.

        Raises:
            UntestableError: the first migration does not fail as expected.
        """

    async def prepare(self, attempt: Attempt) -> None:
        """Prepare the migration, right before it begins.

        Raises:
            UntestableError: the guest or a QEMU fails.
        """
        await attempt.open_destination_ram()

    async def migrate(self, attempt: Attempt) -> None:
        """Migrate, until the destination has loaded everything and both guests are paused.

        Raises:
            UntestableError: the migration does not complete.
        """
        await attempt.migration.start()
        precopy = _HeldPrecopy(self, attempt)
        try:
            async for progress in attempt.follow():
                if attempt.ended_early:
                    await precopy.step(progress)
                else:
                    await self.follow_postcopy(attempt, progress)
        finally:
            attempt.release_log()
        await attempt.migration.load()

    async def amid_precopy(self, attempt: Attempt, hold: PrecopyHold | None) -> bool:
        """Disturb the guest or its device while QEMU logs; the guest uses its write-once pages.

        Call `hold.rest` before a step that takes longer than a poll of the migration.

        Returns:
            Whether the guest must begin to use write-once pages again, when QEMU has sent all pages
            that are dirty now.

        Raises:
            UntestableError: the guest or the device does not survive it.
        """
        pair = attempt.pair
        if pair.device.is_killed:
            attempt.release_log()
            attempt.end_log_watch()
            await pair.device.inject_restart(pair.source_side)
            await attempt.watch_new_log()  # QEMU makes one for the restarted device
        return False

    async def end_precopy(self, attempt: Attempt, hold: PrecopyHold | None) -> None:
        """Let the precopy end. The guest has got the command to end its churn.

        Raises:
            UntestableError: the guest or a QEMU fails.
        """
        await attempt.migration.release()

    async def follow_postcopy(self, attempt: Attempt, progress: Progress) -> None:
        """Take a step in a migration that continues after its precopy has ended.

        Raises:
            UntestableError: the migration cannot continue.
        """

    async def finish(self, pair: QemuPair) -> None:
        """Continue the destination's guest.

        Raises:
            UntestableError: the destination refuses to.
        """
        _logger.info("continuing on the destination")
        await pair.destination.qmp.execute("cont")

    async def disturb_destination(self, pair: QemuPair) -> bool:
        """Disturb the destination's guest or its device, after the guest has rechecked its pages.

        Returns:
            Whether anything was disturbed, so that the guest must do more requests.

        Raises:
            UntestableError: the guest or the device does not survive it.
        """
        return False

    async def start_return(self, pair: QemuPair) -> None:
        """Start a new destination for the way back, after the roles have been swapped.

        Raises:
            UntestableError: the destination could not be started.
        """
        await pair.guarded(pair.start_destination())

    # Requirements ---------------------------------------------------------------------------------

    @property
    def is_held_in_precopy(self) -> bool:
        """Whether QEMU writes to the guest's hold pages, for which it needs a test channel."""
        return True

    def require_device(self, device: ProofDevice) -> None:
        """Refuse a device that the scenario cannot migrate.

        Raises:
            UsageError: the scenario cannot migrate the device, or cannot kill it in precopy.
        """
        if device.facts.killed and not self.is_held_in_precopy:
            raise UsageError(
                f"--kill-device: --scenario {self.name} has no precopy in which dmaproof could "
                "kill the device; choose another scenario"
            )

    def require_dirty_log(self, option: str) -> None:
        """Refuse an `option` that breaks what the device reports, where QEMU keeps no dirty log.

        Raises:
            UsageError: QEMU keeps none in this scenario.
        """
        if not self.has_journal:
            raise UsageError(
                f"{option}: with --scenario {self.name} QEMU has no dirty log, so the fault would "
                "have no effect; choose another scenario"
            )

    def require_qemus(self, source: Path, destination: Path) -> None:
        """Refuse QEMUs between which the scenario cannot migrate.

        Raises:
            UnsupportedError: the scenario cannot.
        """

    def require_host(self) -> None:
        """Check that the host has what the scenario needs.

        Raises:
            UntestableError: a prerequisite is missing.
        """

    def require_accelerator(self, accelerator: str) -> None:
        """Refuse an accelerator with which QEMU cannot carry out the scenario.

        Raises:
            UnsupportedError: QEMU cannot.
        """

    def require_memory(self, backend: MemoryBackend) -> None:
        """Refuse a kind of memory that the scenario cannot migrate.

        Raises:
            UsageError: the scenario cannot migrate memory of this kind.
        """

    @property
    def suits_any_guest(self) -> bool:
        """Whether the scenario is a single migration that works with any guest and any device.

        Such a scenario changes only the steps over QMP (`Procedure`), because
        `qmp_tools.aio.migrate` carries out no other steps.
        """
        changed = (getattr(type(self), step) is not getattr(Scenario, step) for step in _STEPS)
        return self.migrations == 1 and not any(changed)

    @property
    def is_repeatable(self) -> bool:
        """Whether a guest can migrate in this scenario again and again."""
        return True

    @property
    def downtime_is_measurable(self) -> bool:
        """Whether QEMU alone stops the guest, so that the measured downtime is QEMU's."""
        return True

    # Judgement ------------------------------------------------------------------------------------

    def explain_failure(self, error: UntestableError) -> UntestableError:
        """Return the reason why `migrate` failed: `error` itself, or a better explanation."""
        return error

    def source_afterwards(self, pair: QemuPair) -> Qemu:
        """Return the QEMU that answers for the source after the migration."""
        return pair.source

    def untested(self, attempt: Attempt) -> str | None:
        """Return why the migration of `attempt` has not tested enough; None if it has."""
        return None

    @property
    def destination_can_continue(self) -> bool:
        """Whether the destination's guest finds its devices as it left them, and can `finish`."""
        return True

    @property
    def stops_rings(self) -> bool:
        """Whether the source stops its rings, and still reports them after the migration."""
        return True

    @property
    def has_journal(self) -> bool:
        """Whether the device's journal, kept while QEMU logs, covers the migration."""
        return True

    def evidence_source(self, *, has_evidence: bool) -> EvidenceSource:
        """Return the evidence of what the device wrote: its journal if it `has_evidence`."""
        return EvidenceSource.JOURNAL if has_evidence else EvidenceSource.GUEST

    @property
    def blame_without_journal(self) -> Blame:
        """The cause of a lost page about which no journal says more."""
        return Blame.UNKNOWN

    def require_arrival(self, source: Sequence[RamFile], destination: Sequence[RamFile]) -> None:
        """Check that the RAM has reached the destination by the means of this scenario.

        Raises:
            UntestableError: the RAM has not.
        """

    def differing_pages(self, source: RamFile, destination: RamFile) -> NDArray[np.int64]:
        """Return the sorted numbers of the pages of one RAM file that differ at the destination.

        Raises:
            UntestableError: the files cannot be compared.
        """
        return compare(source, destination)

    def given_back(self, differing: NDArray[np.int64], source: RamFile) -> NDArray[np.bool_]:
        """Return which of the `differing` pages of one RAM file the source's guest has given back.

        QEMU need not send their content, so they are counted, and not compared.
        """
        return np.zeros(len(differing), bool)


class _HeldPrecopy:
    """A migration that may end only after the guest has used its write-once pages.

    By its second bitmap sync, QEMU has sent every page once. Only then the guest begins to use the
    write-once pages, each of which the device writes a single time.
    """

    def __init__(self, scenario: Scenario, attempt: Attempt) -> None:
        self._scenario = scenario
        self._attempt = attempt
        pair = attempt.pair
        qtest = pair.qtests.get(pair.source_side)
        self._hold = PrecopyHold(attempt.migration, qtest, pair.hold_pages) if qtest else None
        self._first_sync: int | None = 0
        """The number of syncs before `all_sent_ns` was awaited; None until the next progress."""
        self._is_disturbed = False
        attempt.ended_early = True

    async def step(self, progress: Progress) -> None:
        """Hold the migration, and take the next step when `progress` has come far enough."""
        attempt, guest = self._attempt, self._attempt.pair.source_guest
        if self._hold:
            await self._hold.keep(progress)
        if self._first_sync is None:
            self._first_sync = progress.syncs
        if attempt.all_sent_ns is None:
            if attempt.migration.has_sent_all(progress, self._first_sync):
                attempt.all_sent_ns = progress.time_ns
                await attempt.watch_log()
                await guest.send(START_WRITE_ONCE)
        elif not self._is_disturbed:
            if guest.number("progress", "write_once") or "write-once-done" in guest.latest:
                self._is_disturbed = True
                if await self._scenario.amid_precopy(attempt, self._hold):
                    self._first_sync = attempt.all_sent_ns = None
        elif "write-once-done" in guest.latest and attempt.migration.exercised:
            await self._end()

    async def _end(self) -> None:
        """Let the migration end while the guest uses the last of its write-once pages."""
        attempt = self._attempt
        attempt.ended_early = False
        attempt.release_log()
        await attempt.pair.source_guest.send(START_LAST)
        await attempt.pair.source_guest.send(QUIET)
        await self._scenario.end_precopy(attempt, self._hold)


def require_disk(scenario: Scenario, device: ProofDevice) -> None:
    """Refuse a device that is not a disk.

    Raises:
        UsageError: the device is not a disk.
    """
    if not device.driver.has_disk:
        raise UsageError(
            f"--scenario {scenario.name} needs a disk, and {device.facts.device} is not a disk"
        )


async def migrate_until_all_sent(attempt: Attempt) -> None:
    """Begin the migration, and return when QEMU has sent every page once.

    Raises:
        UntestableError: the migration ended too early.
    """
    await attempt.migration.start()
    async with contextlib.aclosing(attempt.migration.follow()) as precopy:
        async for progress in precopy:
            if attempt.migration.has_sent_all(progress):
                return
