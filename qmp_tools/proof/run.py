"""One proof from end to end: boot, migrate under load, compare, attribute, go on.

The load is kept sharp on purpose. The migration is held in precopy by a low downtime limit and by
pages that the guest's CPU keeps dirtying; once QEMU has sent every page (its second bitmap sync),
the guest is told to use pages of which each is written by the device only once. Only when these are
used up may the migration end. So whatever the chain loses of them stays lost, and is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from dmaproof.errors import UntestableError
from dmaproof.evidence import HARVEST, Evidence, Slot

from ..devices.device import AttachedDevice
from ..exit_codes import EXIT_LOST, EXIT_PASS
from ..guest.channel import QUIET, START_LAST, START_ONCE, SWEEP, GuestLateError
from ..host.run_folder import run_folder
from ..memory.physical_map import parse_flat_view, shown_parts
from ..memory.ram import RamFile, compare, copied, ram_files
from ..migration.downtime import measure_downtime
from ..migration.hold import PrecopyHold
from ..migration.log_watch import LogWatch, used_rings
from ..migration.migration import Migration, MigrationError, Progress
from ..migration.refused_features import explain_refusal
from ..migration.vhost_log import vhost_log
from ..migration.ways import WAYS, FirstAttempt, UnsupportedWayError
from ..qemu.machine import format_memory
from ..qemu.qemu import Qemu
from .attribution import Blame, LostPage, attribute, blame_early_bits, slots_in, with_late_dma
from .display import Display
from .late_dma import PausedRam
from .model import Hop, Proof, Setup
from .pair import QemuPair
from .ram_map import RamMap, joined, map_proof, with_lost
from .rings import ReadRam, Ring, stopped_rings
from .sensitivity import Witness, measure_sharpness, sharpness_by_guest
from .state_refusal import CANNOT_LOAD, StateRefusal, has_refused_state, last_words
from .verdict import GuestOutcome, Verdict

_PATIENCE_AFTER_LOSS_S: Final = 30.0
"""With a guest whose RAM is not what it was, and which may do anything now."""
_REQUESTS_BETWEEN: Final = 100
"""That the source's guest must do after an attempt has failed, before the next begins."""


async def prove(setup: Setup, display: Display, *, keep: bool = False) -> Proof:
    """Carry out one proof.

    Raises:
        UntestableError: it did not come to a verdict; the message says why.
    """
    with run_folder(keep=keep) as folder:
        async with (
            proof_run(setup, display, folder) as run,
            contextlib.aclosing(there_and_back(run, WAYS[setup.scenario].migrations)) as proofs,
        ):
            proof = [it async for it in proofs][-1]
            return replace(proof, folder=folder if keep else None)


async def there_and_back(run: ProofRun, migrations: int) -> AsyncGenerator[Proof, None]:
    """The proofs of so many migrations of one guest, until the first that is no pass.

    Raises:
        UntestableError: one did not come to a verdict; the message says why.
    """
    hops: list[Hop] = []
    for number in range(migrations):
        if number:
            await run.turn_round()
        proof = await run.finish(await run.compare(await run.migrate()))
        yield replace(proof, earlier=tuple(hops))
        hops.append(proof.hop)
        if proof.verdict.exit_code != EXIT_PASS:
            return


@contextlib.asynccontextmanager
async def proof_run(setup: Setup, display: Display, folder: Path) -> AsyncIterator[ProofRun]:
    """The device and both QEMUs of a proof, started; its steps are the caller's to take.

    Raises:
        UntestableError: one of them could not be started.
    """
    display.say(
        f"starting: {format_memory(setup.machine.memory_bytes)} of RAM, "
        f"{setup.machine.machine}, {setup.machine.accelerator}, seed {setup.seed}"
    )
    async with setup.device.start(folder, setup.limits.timeout_s) as device:
        run = ProofRun(setup, display, device, folder)
        try:
            await run.start()
            yield run
        finally:
            await run.end()


@dataclass(frozen=True)
class Migrated:
    """What is known of a migration once it is over and both guests are paused.

    `refusal` is set where the destination has refused a device's state, which ended it.
    """

    versions: Sequence[str]
    migration_s: float
    all_sent_ns: int
    ended_early: bool
    migration: Migration
    refusal: StateRefusal | None = None

    @property
    def source_continued(self) -> bool:
        """Whether the source's RAM is not that of the migration's end any more."""
        return self.refusal is not None and self.refusal.source_continued


class ProofRun(QemuPair):
    """The steps that a proof takes with its processes, each of them `guarded`."""

    def __init__(
        self, setup: Setup, display: Display, device: AttachedDevice, folder: Path
    ) -> None:
        super().__init__(setup, display, device, folder)
        self._moment: Sequence[RamFile] | None = None
        self._arrived: Sequence[RamFile] | None = None
        """The destination's RAM, open before it can end."""
        self._kept = contextlib.AsyncExitStack()
        """Holds the RAM of the moment, and that which arrives."""
        self._paused: PausedRam | None = None
        self._log_watch: LogWatch | None = None
        self._began_s = 0.0
        self._all_sent_ns: int | None = None
        self._released = False

    async def end(self) -> None:
        """See `QemuPair.end`."""
        self._end_log_watch()
        await self._kept.aclose()
        await super().end()

    async def migrate(self) -> Migrated:
        """Migrate; both guests are paused afterwards, unless the destination refused its own.

        Raises:
            UntestableError: it does not come to that.
        """
        if attempt := self._way.first_attempt:
            await self.guarded(self._migrate_and_fail(attempt))
            await self.guarded(self._start_destination())
        if self._way.cpr_channel:
            await self.guarded(self._launch_to_join())
        if self._way.in_place:
            await self.guarded(self._prepare_successor())
        migration = self._migration()
        try:
            await self.guarded(self._migrate_to_the_end(migration))
        except UntestableError as error:
            accepted = self.device.accepted_features(self.here)
            if reason := explain_refusal(str(error), accepted):
                raise UnsupportedWayError(f"{reason}\n{error}") from error
            if self._way.snapshot and CANNOT_LOAD in str(error):
                raise UnsupportedWayError(
                    "QEMU took a snapshot that cannot be loaded, as it does not hold off what a "
                    "device outside QEMU writes: its rings are of a later moment than the devices' "
                    f"state\n{error}"
                ) from error
            if not self._state_was_refused():
                raise
            return await self.guarded(self._after_refusal(migration, error))
        return await self._migrated(migration)

    async def _migrated(
        self,
        migration: Migration,
        refusal: StateRefusal | None = None,
    ) -> Migrated:
        source = self.there if self._way.in_place else self.here
        return Migrated(
            versions=[await self.qemus[side].qmp.version() for side in (source, self.there)],
            migration_s=time.monotonic() - self._began_s,
            all_sent_ns=time.monotonic_ns() if self._all_sent_ns is None else self._all_sent_ns,
            ended_early=self._way.holds_precopy and not self._released,
            migration=migration,
            refusal=refusal,
        )

    def _state_was_refused(self) -> bool:
        """Whether the destination refused a device's state, and its RAM can still be read."""
        destination = self.qemus[self.there].process
        return self._arrived is not None and has_refused_state(destination)

    async def _after_refusal(self, migration: Migration, error: UntestableError) -> Migrated:
        """Pause the source, unless it has sent everything before it noticed, and is paused."""
        destination = self.qemus[self.there].process
        destination.expect_end()
        self.device.release(self.there)
        source_continued = False
        try:
            async for _ in migration.follow():
                pass
        except MigrationError:
            source_continued = True
            await migration.fail()
            await self.qemus[self.here].qmp.execute("stop")
        refusal = StateRefusal(error, last_words(destination), source_continued)
        return await self._migrated(migration, refusal)

    async def _migrate_to_the_end(self, migration: Migration) -> None:
        source, destination = self.qemus[self.here], self.qemus[self.there]
        await self._kept.aclose()
        self._moment = self._arrived = self._all_sent_ns = None
        self._released = False
        if self._way.stands_still:
            guest = self._guests[self.here]
            await guest.tell(START_ONCE)
            await guest.wait_for(lambda: "once-done" in guest.latest, "used its once pages")
        self._paused = self._log_watch = None
        if self._way.snapshot or self._way.in_place:
            await source.qmp.execute("stop")
            async with ram_files(source) as files:
                self._moment = self._kept.enter_context(copied(files))
        if not self._joins_late:
            self._arrived = await self._kept.enter_async_context(ram_files(destination))
        self._display.say(f"migrating ({self._setup.scenario})")

        self._began_s = time.monotonic()
        await self._migrate(migration)
        await migration.load()

    async def compare(self, migrated: Migrated) -> Proof:
        """Hold the RAM of both against each other; the destination's guest stands still yet.

        Raises:
            UntestableError: the RAM or the device's evidence cannot be had.
        """
        return await self.guarded(self._compare(migrated))

    async def _compare(self, migrated: Migrated) -> Proof:
        source, destination = self.qemus[self.here], self.qemus[self.there]
        began_s = time.monotonic()
        self._display.say("comparing every page of RAM")
        self._end_log_watch()
        blame = Blame.SNAPSHOT if self._way.snapshot else Blame.UNKNOWN
        evidence: Sequence[Evidence] = []
        if not (self._way.snapshot or self._way.stands_still):  # there is no journal but of a log
            evidence = await self.device.evidence(self.here)
        known = evidence[0].slots if evidence else []
        places: list[Slot] = []
        lost: list[LostPage] = []
        maps: list[RamMap] = []
        pages = 0
        async with self._ram_to_hold_against() as ours, self._ram_that_arrived() as theirs:
            if [it.backend for it in ours] != [it.backend for it in theirs]:
                raise UntestableError("source and destination have not the same memory backends")
            if self._way.cpr_channel and ours[0].inode != theirs[0].inode:
                raise UntestableError("the source has copied its memory and not handed it over")
            if not migrated.source_continued and all(
                our.inode != their.inode for our, their in zip(ours, theirs, strict=True)
            ):
                self._paused = PausedRam(ours)
            for source_ram, destination_ram in zip(ours, theirs, strict=True):
                asked = source if migrated.refusal else destination
                slots = known or await _slots(asked, source_ram)
                places += slots
                if migrated.source_continued:
                    continue
                differing = compare(source_ram, destination_ram)
                found = attribute(differing, source_ram, destination_ram, slots, evidence, blame)
                if migrated.ended_early:  # QEMU may have written to them when all had been sent
                    found = [page for page in found if page.gpa not in self._hold_pages]
                maps.append(map_proof(slots, evidence, found, source_ram, migrated.all_sent_ns))
                lost += found
                pages += source_ram.pages
            rams = {self.here: _reader(places, ours, ours)}
            if migrated.source_continued:
                rams[self.there] = _reader(places, ours, theirs)
            wrong_rings = await self._wrong_rings(rams)
        if evidence and not known:
            evidence = [replace(it, slots=places) for it in evidence]
        if self._log_watch is not None:
            lost = blame_early_bits(lost, self._log_watch.evidence())
        compare_s = time.monotonic() - began_s

        self._display.say(f"{len(lost)} of {pages} pages differ")
        if self._way.stands_still or self._way.snapshot:
            witness = Witness.SNAPSHOT if self._way.snapshot else Witness.STILL
            sharpness = sharpness_by_guest(self._once_pages(), witness)
        elif evidence:
            sharpness = measure_sharpness(evidence, migrated.all_sent_ns)
        else:
            once = 0 if migrated.source_continued else self._once_pages()
            sharpness = sharpness_by_guest(once, certain=self._setup.device.direct)
        migration = migrated.migration
        harvests = np.sort(
            np.concatenate([np.empty(0, dtype=HARVEST), *(it.harvests for it in evidence)]),
            order="time_ns",
        )
        downtime = measure_downtime(
            migration.moments,
            harvests,
            migration.history[-1].downtime_s,
            migration.loading_ns,
            self._setup.max_downtime_s,
        )
        verdict = Verdict(
            pages,
            lost,
            sharpness,
            GuestOutcome(0, 0, 0),
            migrated.ended_early,
            downtime=downtime,
            wrong_rings=wrong_rings,
            refusal=migrated.refusal.words if migrated.refusal else None,
        )
        if migrated.refusal and verdict.exit_code != EXIT_LOST:
            raise migrated.refusal.error
        return Proof(
            setup=self._setup,
            verdict=verdict,
            qemu_version=migrated.versions[0],
            qemu_destination_version=migrated.versions[1],
            boot_s=self._boot_s,
            migration_s=migrated.migration_s,
            compare_s=compare_s,
            downtime_s=migration.history[-1].downtime_s,
            history=migration.history,
            moments=migration.moments,
            harvests=harvests,
            ram_map=joined(maps),
            commands={
                it.name: it.command
                for it in (source.process, destination.process, *self.device.processes)
            },
            folder=None,
        )

    async def _wrong_rings(self, rams: Mapping[str, ReadRam]) -> Sequence[Ring]:
        """The rings in the `rams` that cannot be right; none where that cannot be known.

        It is known of split rings, of a source that is paused. Behind an IOMMU, QEMU tells where
        rings are in IOVAs.
        """
        told_by_nobody = self._way.snapshot or self._way.in_place or not self.device.processes
        if (
            told_by_nobody
            or self._setup.machine.iommu is not None
            or self._setup.device.facts.ring == "packed"
        ):
            return []
        return [
            ring
            for ring in await stopped_rings(self.qemus[self.here].qmp, rams)
            if not (ring.is_consistent and (ring.is_answered_right or ring.side == self.there))
        ]

    def _once_pages(self) -> int:
        """How many of its once pages the guest has had read into."""
        guest = self._guests[self.here]
        return max(guest.number("once-done", "pages"), guest.number("progress", "once"))

    @contextlib.asynccontextmanager
    async def _ram_to_hold_against(self) -> AsyncIterator[Sequence[RamFile]]:
        """The source's RAM, or what it was at the moment of which there is a snapshot."""
        if self._moment is not None:
            yield self._moment
            return
        async with ram_files(self.qemus[self.here]) as files:
            yield files

    @contextlib.asynccontextmanager
    async def _ram_that_arrived(self) -> AsyncIterator[Sequence[RamFile]]:
        """The destination's RAM, which was open before it arrived where that could be."""
        if self._arrived is not None:
            yield self._arrived
            return
        async with ram_files(self.qemus[self.there]) as files:
            yield files

    def _hold(self, migration: Migration) -> PrecopyHold | None:
        qtest = self._qtests.get(self.here)
        return PrecopyHold(migration, qtest, self._hold_pages) if qtest else None

    def _migration(self) -> Migration:
        return Migration(
            self._ends(),
            self._way,
            self._setup.limits,
            must_be_refused=self._way.refusal is not None and self.device.lacks_pagefault,
        )

    async def _migrate_and_fail(self, attempt: FirstAttempt) -> None:
        """Migrate until every page has been sent, and let it fail; the source's guest goes on.

        The device's log must be taken from it, or it would go on logging for nobody. On a machine
        on which the guest gets nowhere for a while, nothing but the pause keeps it from completing.
        """
        self._display.say(f"a first migration, {attempt.value}")
        guest, destination = self._guests[self.here], self.qemus[self.there]
        await self._let_pause_before_switchover(True)
        migration = self._migration()
        await migration.start()
        async with contextlib.aclosing(migration.follow()) as precopy:
            async for progress in precopy:
                if progress.syncs >= 2:
                    break
        if attempt is FirstAttempt.DESTINATION_KILLED_AT_SWITCHOVER:
            await migration.pause_before_switchover()
        destination.process.expect_end()
        self.device.release(self.there)
        if attempt is FirstAttempt.CANCELLED:
            await migration.cancel()
        else:
            await destination.process.kill()
            await migration.fail()
        await self.device.logging_ended(self.here)
        self._guests[self.there].close()
        await destination.end()
        await self._let_pause_before_switchover(False)
        wanted = guest.number("progress", "requests") + _REQUESTS_BETWEEN
        await guest.wait_for(
            lambda: guest.number("progress", "requests") >= wanted,
            f"done {_REQUESTS_BETWEEN} more requests after the first migration",
        )

    async def _let_pause_before_switchover(self, state: bool) -> None:
        capability = {"capability": "pause-before-switchover", "state": state}
        await self.qemus[self.here].qmp.execute(
            "migrate-set-capabilities", capabilities=[capability]
        )

    async def _migrate(self, migration: Migration) -> None:
        """Migrate, and note when every page had been sent once, and whether it was released."""
        guest = self._guests[self.here]
        disturbed = False
        once = 0
        await migration.start()
        hold = self._hold(migration)
        try:
            async for progress in migration.follow():
                self._display.precopy(progress)
                if hold and not self._released:
                    await hold.keep(progress)
                if once < (once := self._once_pages()):
                    migration.restart_timeout()
                if self._way.stands_still:
                    continue
                if self._way.snapshot:
                    await self._run_on(progress)
                    continue
                if self._all_sent_ns is None and progress.syncs >= 2:
                    self._all_sent_ns = progress.time_ns
                    self._log_watch = await self._watch_log()
                    await guest.tell(START_ONCE)
                elif self._all_sent_ns is not None and not disturbed:
                    if guest.number("progress", "once") or "once-done" in guest.latest:
                        disturbed = True
                        await self.device.disturb(self.here)
                elif not self._released and "once-done" in guest.latest and migration.way_shown:
                    self._released = True
                    if self._log_watch is not None:
                        self._log_watch.let_go()
                    await guest.tell(START_LAST)
                    await guest.tell(QUIET)
                    await migration.release()
        finally:
            if self._log_watch is not None:
                self._log_watch.let_go()
            self._display.close()

    async def _watch_log(self) -> LogWatch | None:
        """Watch QEMU's vhost log, where nothing else tells what the device has reported."""
        if not self._is_third_party:
            return None
        source = self.qemus[self.here]
        with vhost_log(source.process.pid, source.process.name, os.O_RDWR) as log:
            if log is None:  # the migration is over already
                return None
            # Behind an IOMMU, QEMU tells a ring's bus address.
            rings = [] if self._setup.machine.iommu else await used_rings(source.qmp)
            async with ram_files(source) as files:
                slots = [slot for ram in files for slot in await _slots(source, ram)]
                return LogWatch(log, files, slots, rings)

    @property
    def _is_third_party(self) -> bool:
        """Whether the device keeps no journal, and is outside QEMU."""
        return self._setup.device.facts.tracker is None and bool(self.device.processes)

    def _end_log_watch(self) -> None:
        if self._log_watch is not None:
            self._log_watch.end()

    async def _run_on(self, progress: Progress) -> None:
        """Let the source's guest run, and its device write, while the snapshot is taken."""
        qmp, guest = self.qemus[self.here].qmp, self._guests[self.here]
        if progress.status != "active":
            return
        if (await qmp.execute("query-status"))["status"] != "running":
            await qmp.execute("cont")  # QEMU 7.2 does so by itself
        await guest.tell(START_ONCE)

    async def finish(self, proof: Proof) -> Proof:
        """Let the guest go on, and add to the verdict what it saw.

        Raises:
            UntestableError: it does not go on, though no page was lost, and no request either.
        """
        if self._way.snapshot:  # the disk is of another moment, so the guest must find it wrong
            return proof
        return await self.guarded(self._settle(await self._finish(proof)))

    async def _settle(self, proof: Proof) -> Proof:
        """Add to the verdict what has happened at the source since its guest was paused."""
        if self._paused is None:
            return proof
        source, verdict = self.qemus[self.here], proof.verdict
        paused_s = (proof.moments.get("STOP") or proof.history[-1].time_ns) / 1e9
        if self._is_third_party:
            left_s = paused_s + self._setup.settle_s - time.monotonic()
            self._display.say(f"watching the source's RAM for {max(0.0, left_s):.1f} s more")
            await asyncio.sleep(left_s)
        late: list[LostPage] = []
        settled_s = time.monotonic() - paused_s
        async with ram_files(source) as files:
            for ram in files:
                late += self._paused.written(ram, slots_in(ram, await _slots(source, ram)))
        verdict = replace(
            verdict,
            lost=with_late_dma(verdict.lost, late),
            settled_s=settled_s,
            log=self._log_watch.evidence() if self._log_watch is not None else None,
        )
        return replace(proof, verdict=verdict, ram_map=with_lost(proof.ram_map, late))

    async def _finish(self, proof: Proof) -> Proof:
        if not proof.verdict.can_go_on:
            return proof
        lost = proof.verdict.lost
        try:
            guest = await self.guarded(self._go_on(_PATIENCE_AFTER_LOSS_S if lost else None))
        except UntestableError as error:
            unanswered = self._unanswered() if isinstance(error, GuestLateError) else 0
            if not (lost or unanswered):
                raise
            complaints = [str(error).splitlines()[0]]
            if unanswered:
                complaints.append(
                    f"{unanswered} of its requests are not answered: the source's device let go of "
                    "its rings before it had done them, or its last writes to them are lost"
                )
            guest = GuestOutcome(0, unanswered or 1, 0, complaints)
        return replace(proof, verdict=replace(proof.verdict, guest=guest))

    def _unanswered(self) -> int:
        """How many requests the destination's guest waits for, where it makes no new ones."""
        guest = self._guests[self.there]
        return 0 if "sweep" in guest.latest else guest.number("progress", "under_way")

    async def _go_on(self, timeout_s: float | None) -> GuestOutcome:
        """Continue on the destination; its guest checks all its pages, and works on.

        `timeout_s` is a bound of each wait lower than the set-up's.

        Raises:
            UntestableError: the guest does not; after lost pages it may well not.
        """
        destination, guest = self.qemus[self.there], self._guests[self.there]
        self._display.say("continuing on the destination")
        before = self._guests[self.here].number("progress", "requests")
        await destination.qmp.execute("cont")
        await guest.tell(SWEEP)
        wanted = before + self._setup.requests_after
        await guest.wait_for(lambda: "sweep" in guest.latest, "swept its pages", timeout_s)
        await guest.wait_for(
            lambda: guest.number("progress", "requests") >= wanted,
            f"done {self._setup.requests_after} more requests",
            timeout_s,
        )
        return GuestOutcome(
            requests=guest.number("progress", "requests") - before,
            errors=guest.number("progress", "errors"),
            swept=guest.number("sweep", "pages"),
            complaints=guest.complaints,
        )


async def _slots(qemu: Qemu, ram: RamFile) -> list[Slot]:
    """Where `ram` stands in the guest's physical map, as QEMU itself tells it."""
    view = await qemu.qmp.execute("human-monitor-command", command_line="info mtree -f")
    return [
        Slot(gpa, length, offset, ram.device, ram.inode)
        for gpa, offset, length in shown_parts(parse_flat_view(view), ram.backend)
    ]


def _reader(slots: Sequence[Slot], known: Sequence[RamFile], files: Sequence[RamFile]) -> ReadRam:
    """Reads the RAM in `files`, each of which stands for the one of `known` that `slots` name."""
    by_inode = {(it.device, it.inode): file for it, file in zip(known, files, strict=True)}

    def read(gpa: int, length: int) -> bytes | None:
        for slot in slots:
            if slot.gpa <= gpa and gpa + length <= slot.gpa + slot.length:
                file = by_inode[slot.device, slot.inode]
                return file.read(slot.file_offset + gpa - slot.gpa, length)
        return None

    return read
