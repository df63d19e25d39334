"""A migration scenario: a class with the steps of a proof's migration, and how it is judged.

The defaults are those of a live precopy migration that is held until its proof is sharp. A scenario
overrides what is different, in a file of this package, or in any other package by the entry-point
group ``dmaproof.scenarios``::

    class Precious(Scenario):
        name = "precious"
        summary = "sent over a link that loses nothing"
        capabilities = ("return-path",)

The steps, in their order: `start`, then for each migration `first_attempt`, `prepare`, `migrate`
and `finish`, and between two migrations `start_return`. The caller guards each step against the
death of a process (`QemuPair.guarded`), but for `start` and `start_return`, which guard their own
parts. Between `migrate` and `finish` the guests are compared, as the scenario's answers say.

Each proof has a scenario of its own, so a step may keep in `self` what a later step or answer
needs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError

from ...devices.device import ProofDevice
from ...guest.channel import QUIET, START_LAST, START_WRITE_ONCE
from ...memory.ram import RamFile, compare
from ...qemu.qemu import Qemu
from ..attempt import Attempt
from ..hold import PrecopyHold
from ..judgement import Blame, EvidenceSource
from ..migration import Progress
from ..pair import QemuPair
from ..procedure import Procedure

_logger = logging.getLogger(__name__)

_STEPS: Final = ("start", "first_attempt", "prepare", "migrate", "start_return")
"""The steps before the guest goes on, all of which take a proof's processes."""


class Scenario(Procedure):
    """How a guest migrates; see `Procedure` for what QEMU is told.

    `name` is what the command line and reports call it, `summary` says it in some words.
    `migrations` is how often the guest migrates, there and back. `machine` is the machine type
    where no other is asked for, `machine_options` what any machine is told besides
    (",option=value"), and `dimms` how many DIMMs get plugged.
    """

    name: str
    summary: str
    migrations: int = 1
    machine: str = "q35"
    machine_options: str = ""
    dimms: int = 0

    # The steps ------------------------------------------------------------------------------------

    async def start(self, pair: QemuPair) -> None:
        """Start the QEMUs, and wait until the source's guest is ready.

        Raises:
            UntestableError: one of them could not be started, or the guest does not come to that.
        """
        await pair.guarded(pair.start_both())
        await pair.guarded(pair.boot())

    async def first_attempt(self, attempt: Attempt) -> None:
        """Carry out, on an attempt of its own, what comes before the migration that is proved.

        Raises:
            UntestableError: it does not fail as it is to.
        """

    async def prepare(self, attempt: Attempt) -> None:
        """Do what comes right before the migration.

        Raises:
            UntestableError: the guest or a QEMU does not do what it takes.
        """
        await attempt.open_destination_ram()

    async def migrate(self, attempt: Attempt) -> None:
        """Migrate; the destination has loaded everything afterwards, and both guests are paused.

        Raises:
            UntestableError: it does not come to that.
        """
        await attempt.migration.start()
        precopy = _HeldPrecopy(attempt)
        try:
            async for progress in attempt.follow():
                await precopy.step(progress)
        finally:
            attempt.let_go_of_log()
        await attempt.migration.load()

    async def finish(self, pair: QemuPair) -> None:
        """Let the destination's guest go on.

        Raises:
            UntestableError: the destination refuses it.
        """
        _logger.info("continuing on the destination")
        await pair.destination.qmp.execute("cont")

    async def start_return(self, pair: QemuPair) -> None:
        """Start a new destination, to which the guest goes back; the roles are swapped already.

        Raises:
            UntestableError: it could not be started.
        """
        await pair.guarded(pair.start_destination())

    # What it takes --------------------------------------------------------------------------------

    @property
    def is_held_in_precopy(self) -> bool:
        """Whether QEMU writes to the guest's hold pages, which takes a test channel."""
        return True

    def require_device(self, device: ProofDevice) -> None:
        """Refuse a device that cannot migrate so.

        Raises:
            UsageError: it cannot.
        """

    @property
    def suits_any_guest(self) -> bool:
        """Whether it is a single migration of any guest with any device, and not only of a proof's.

        If so, the steps over QMP (`Procedure`) are all that it changes: `qmp_tools.aio.migrate`
        carries out no others.
        """
        changed = (getattr(type(self), step) is not getattr(Scenario, step) for step in _STEPS)
        return self.migrations == 1 and not any(changed)

    @property
    def is_repeatable(self) -> bool:
        """Whether a guest that has migrated so can migrate back so, and so on."""
        return True

    @property
    def downtime_is_measurable(self) -> bool:
        """Whether QEMU alone stops the guest, so that its downtime means something."""
        return True

    # How it is judged -----------------------------------------------------------------------------

    def explain_failure(self, error: UntestableError) -> UntestableError:
        """What it means that `migrate` failed: `error` itself, or one that says it better."""
        return error

    def source_afterwards(self, pair: QemuPair) -> Qemu:
        """The QEMU that answers for the source once the migration is over."""
        return pair.source

    @property
    def destination_can_continue(self) -> bool:
        """Whether the destination's guest finds its devices as it left them, and can `finish`."""
        return True

    @property
    def stops_rings(self) -> bool:
        """Whether the source still reports its rings after the migration, and has stopped them."""
        return True

    @property
    def has_journal(self) -> bool:
        """Whether the device's journal covers the migration: it is kept while QEMU logs."""
        return True

    def evidence_source(self, *, has_evidence: bool) -> EvidenceSource:
        """Who knows what the device wrote; the device has kept a journal if it `has_evidence`."""
        return EvidenceSource.JOURNAL if has_evidence else EvidenceSource.GUEST

    @property
    def blame_without_journal(self) -> Blame:
        """Whose loss a page is of which no journal tells more."""
        return Blame.UNKNOWN

    def require_arrival(self, source: Sequence[RamFile], destination: Sequence[RamFile]) -> None:
        """See that the RAM has reached the destination as it is to in this scenario.

        Raises:
            UntestableError: it has not.
        """

    def differing_pages(self, source: RamFile, destination: RamFile) -> NDArray[np.int64]:
        """The numbers of the pages of one RAM file that are wrong at the destination, sorted.

        Raises:
            UntestableError: the files cannot be compared.
        """
        return compare(source, destination)


class _HeldPrecopy:
    """A migration that may end only when the guest has used its write-once pages.

    QEMU has sent every page once when it has synced its bitmap a second time. Then the guest begins
    to use pages that the device writes a single time each.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        pair = attempt.pair
        qtest = pair.qtests.get(pair.source_side)
        self._hold = PrecopyHold(attempt.migration, qtest, pair.hold_pages) if qtest else None
        self._restart_injected = False
        attempt.ended_early = True

    async def step(self, progress: Progress) -> None:
        """Do what is due when the migration is as far as `progress` says."""
        attempt, guest = self._attempt, self._attempt.pair.source_guest
        if self._hold and attempt.ended_early:
            await self._hold.keep(progress)
        if attempt.all_sent_ns is None:
            if progress.syncs >= 2:
                attempt.all_sent_ns = progress.time_ns
                await attempt.watch_log()
                await guest.tell(START_WRITE_ONCE)
        elif not self._restart_injected:
            if guest.number("progress", "write_once") or "write-once-done" in guest.latest:
                self._restart_injected = True
                await attempt.pair.device.inject_restart(attempt.pair.source_side)
        elif (
            attempt.ended_early
            and "write-once-done" in guest.latest
            and attempt.migration.exercised
        ):
            await self._release()

    async def _release(self) -> None:
        """Let the migration end while the guest uses the last of its write-once pages."""
        self._attempt.ended_early = False
        self._attempt.let_go_of_log()
        await self._attempt.pair.source_guest.tell(START_LAST)
        await self._attempt.pair.source_guest.tell(QUIET)
        await self._attempt.migration.release()


async def migrate_until_all_sent(attempt: Attempt) -> None:
    """Begin the migration, and return when QEMU has sent every page once.

    Raises:
        UntestableError: the migration ends before.
    """
    await attempt.migration.start()
    async with contextlib.aclosing(attempt.migration.follow()) as precopy:
        async for progress in precopy:
            if progress.syncs >= 2:
                return
