"""One proof from end to end: boot, migrate under load, compare, attribute, continue.

The load is designed to be sensitive. A low downtime limit, and pages that QEMU keeps dirtying, hold
a live migration in precopy. Once QEMU has sent every page (its second bitmap sync), the guest
starts to use pages that the device writes exactly once. The migration may end only after the guest
has used all of them. A dirty bit of such a page that the chain loses therefore stays lost, and the
comparison detects it.

The scenario (`migration.scenarios`) defines what each step does and how its result is judged. The
run carries out the steps in order, and makes a verdict from their findings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError
from dmaproof.evidence import HARVEST, Evidence

from ..devices.device import AttachedDevice
from ..exit_codes import EXIT_LOST, EXIT_PASS
from ..host.run_folder import run_folder
from ..memory.ram import ram_files, slots_of
from ..migration.attempt import Attempt
from ..migration.downtime import Downtime, measure_downtime
from ..migration.judgement import EvidenceSource
from ..migration.migration import ConnectionLostError, Migration, MigrationError
from ..migration.pair import QemuPair
from ..migration.procedure import UnsupportedScenarioError
from ..migration.progress_log import OnProgress, ProgressLog
from ..migration.refused_features import explain_refusal
from ..migration.scenarios import find_scenario
from ..migration.state_refusal import StateRefusal, has_refused_state, last_words
from ..qemu.machine import DESTINATION, SOURCE, format_memory
from ..qemu.qemu import OwnedQemu
from .attribution import LostPage, slots_in, with_late_dma
from .comparison import Comparison, compare_guests
from .continuation import continue_guest
from .late_dma import PausedRam
from .model import Migrated, MigrationSummary, Proof, Setup
from .ram_map import joined, with_lost
from .sensitivity import Sensitivity, measure_sensitivity, sensitivity_by_guest
from .verdict import GuestOutcome, Verdict

_logger = logging.getLogger(__name__)


async def prove(
    setup: Setup, on_progress: OnProgress | None = None, *, keep: bool = False
) -> Proof:
    """Carry out one proof.

    Args:
        setup: all that the proof depends on.
        on_progress: see `ProofRun`.
        keep: whether to keep the run's folder.

    Returns:
        The verdict, and a record of the run.

    Raises:
        UntestableError: the proof did not reach a verdict; the message says why.
    """
    count = find_scenario(setup.scenario).migrations
    with run_folder(keep=keep) as folder:
        async with (
            proof_run(setup, folder, on_progress) as run,
            contextlib.aclosing(consecutive_proofs(run, count)) as proofs,
        ):
            proof = [proof async for proof in proofs][-1]
            return replace(proof, folder=folder if keep else None)


async def consecutive_proofs(run: ProofRun, count: int) -> AsyncGenerator[Proof, None]:
    """Yield the proofs of `count` migrations of one guest, which swap source and destination.

    The first proof that does not pass is the last one.

    Raises:
        UntestableError: a proof did not reach a verdict; the message says why.
    """
    migrations: list[MigrationSummary] = []
    for number in range(count):
        if number:
            await run.prepare_return()
        proof = await run.finish(await run.compare(await run.migrate()))
        yield replace(proof, earlier=tuple(migrations))
        migrations.append(proof.migration_summary)
        if proof.verdict.exit_code != EXIT_PASS:
            return


@contextlib.asynccontextmanager
async def proof_run(
    setup: Setup, folder: Path, on_progress: OnProgress | None = None
) -> AsyncIterator[ProofRun]:
    """Start the device and both QEMUs of a proof; the caller takes its steps.

    Raises:
        UntestableError: the device or a QEMU could not be started.
    """
    machine = setup.machine
    _logger.info(
        "starting: %s of RAM, %s, %s, seed %s",
        *(format_memory(machine.memory_bytes), machine.machine, machine.accelerator, setup.seed),
    )
    async with setup.device.start(folder, setup.limits.timeout_s) as device:
        run = ProofRun(setup, device, folder, on_progress)
        try:
            await run.start()
            yield run
        finally:
            await run.end()


class ProofRun:
    """The steps of a proof with a pair of QEMUs, as its scenario defines them."""

    def __init__(
        self,
        setup: Setup,
        device: AttachedDevice,
        folder: Path,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Plan a run; nothing is started yet.

        Args:
            setup: all that the proof depends on.
            device: the device that serves both QEMUs.
            folder: the folder of sockets and logs.
            on_progress: receives each progress of a migration; None logs it once a second.
        """
        self.scenario = find_scenario(setup.scenario)
        self.scenario.extend(setup.options.capabilities, setup.options.parameters)
        self.pair = QemuPair(
            setup.machine,
            {SOURCE: setup.qemu, DESTINATION: setup.qemu_destination},
            device,
            folder,
            timeout_s=setup.limits.timeout_s,
            host=setup.host,
            has_test_channel=self.scenario.is_held_in_precopy,
        )
        self._setup = setup
        self._on_progress = on_progress or ProgressLog()
        self._attempt = self._new_attempt()
        self._paused: PausedRam | None = None

    @property
    def qemus(self) -> Mapping[str, OwnedQemu]:
        """The QEMU of each side that has been started."""
        return self.pair.qemus

    @property
    def device(self) -> AttachedDevice:
        """The device that serves both QEMUs."""
        return self.pair.device

    async def start(self) -> None:
        """Start the QEMUs, and wait until the source's guest is ready.

        Raises:
            UntestableError: a QEMU could not be started, or the guest did not become ready.
        """
        await self.scenario.start(self.pair)

    async def end(self) -> None:
        """End both QEMUs, and release the resources of the last migration."""
        await self._attempt.end()
        await self.pair.end()

    async def prepare_return(self) -> None:
        """Prepare a migration back to the side that the guest came from.

        Raises:
            UntestableError: the guest does not become ready, or the new QEMU does not start.
        """
        await self.pair.swap_roles()
        await self.scenario.start_return(self.pair)

    # Migrating ------------------------------------------------------------------------------------

    async def migrate(self) -> Migrated:
        """Migrate; both guests are then paused, unless the destination refused a device's state.

        Raises:
            UntestableError: the migration did not reach this point.
        """
        pair, scenario = self.pair, self.scenario
        first = self._new_attempt()
        try:
            await pair.guarded(scenario.first_attempt(first))
        finally:
            await first.end()
        await self._attempt.end()
        attempt = self._attempt = self._new_attempt()
        self._paused = None
        await pair.guarded(scenario.prepare(attempt))
        self.device.migrates_from(pair.source_side)
        _logger.info("migrating (%s)", scenario.name)
        began_s = time.monotonic()
        refusal = None
        try:
            await pair.guarded(scenario.migrate(attempt))
        except UntestableError as error:
            refusal = await self._refusal(attempt, error)
        return await self._migrated(attempt, time.monotonic() - began_s, refusal)

    def _new_attempt(self) -> Attempt:
        return Attempt(
            self.pair,
            self.scenario,
            self._setup.limits,
            self._on_progress,
            has_readable_rings=self._has_readable_rings,
            watches_log=self._is_third_party,
        )

    async def _migrated(
        self, attempt: Attempt, migration_s: float, refusal: StateRefusal | None
    ) -> Migrated:
        qemus = (self.scenario.source_afterwards(self.pair), self.pair.destination)
        all_sent_ns = attempt.all_sent_ns
        return Migrated(
            versions=[qemu.version for qemu in qemus],
            migration_s=migration_s,
            all_sent_ns=time.monotonic_ns() if all_sent_ns is None else all_sent_ns,
            ended_early=attempt.ended_early,
            migration=attempt.migration,
            refusal=refusal,
            untested=None if refusal else self.scenario.untested(attempt),
        )

    async def _refusal(self, attempt: Attempt, error: UntestableError) -> StateRefusal:
        """Return the refusal of a device's state that made the migration fail; pause the source.

        Raises:
            UntestableError: the migration failed for another reason, which the error names.
        """
        accepted = self.pair.device.accepted_features(self.pair.source_side)
        if reason := explain_refusal(str(error), accepted):
            raise UnsupportedScenarioError(f"{reason}\n{error}") from error
        explained = self.scenario.explain_failure(error)
        if explained is not error:
            raise explained from error
        refused = has_refused_state(self.pair.destination.process)
        if not (attempt.has_destination_ram and refused):
            raise error
        return await self.pair.guarded(self._pause_refused(attempt.migration, error))

    async def _pause_refused(self, migration: Migration, error: UntestableError) -> StateRefusal:
        """Pause the source, unless it had sent everything by then and is already paused."""
        destination = self.pair.destination.process
        destination.expect_end()
        self.pair.device.release(self.pair.destination_side)
        refusal = StateRefusal(error, last_words(destination))
        try:
            async for _ in migration.follow():
                pass
        except ConnectionLostError:
            return replace(refusal, has_all_pages=False)
        except MigrationError:
            await migration.fail()
            await self.pair.source.qmp.execute("stop")
            return replace(refusal, source_continued=True)
        return refusal

    # Comparing ------------------------------------------------------------------------------------

    async def compare(self, migrated: Migrated) -> Proof:
        """Compare the RAM of both sides, while the destination's guest is still paused.

        Raises:
            UntestableError: the RAM or the device's evidence cannot be read.
        """
        return await self.pair.guarded(self._compare(migrated))

    async def _compare(self, migrated: Migrated) -> Proof:
        began_s = time.monotonic()
        _logger.info("comparing every page of RAM")
        self._attempt.end_log_watch()
        found = await compare_guests(
            self.pair,
            self.scenario,
            self._attempt,
            migrated,
            reports_rings=self._reports_rings,
        )
        self._paused = found.paused
        compare_s = time.monotonic() - began_s
        _logger.info("%d of %d pages differ", len(found.lost), found.pages)
        migration, harvests = migrated.migration, _harvests(found.evidence)
        verdict = self._verdict(found, migrated, harvests)
        if migrated.refusal and verdict.exit_code != EXIT_LOST:
            raise migrated.refusal.error
        processes = [qemu.process for qemu in (self.pair.source, self.pair.destination)]
        return Proof(
            setup=self._setup,
            verdict=verdict,
            qemu_version=migrated.versions[0],
            qemu_destination_version=migrated.versions[1],
            boot_s=self.pair.boot_s,
            migration_s=migrated.migration_s,
            compare_s=compare_s,
            downtime_s=migration.history[-1].downtime_s,
            history=migration.history,
            moments=migration.moments,
            harvests=harvests,
            ram_map=joined(found.maps),
            commands={
                process.name: process.command for process in (*processes, *self.device.processes)
            },
            folder=None,
        )

    def _verdict(
        self, found: Comparison, migrated: Migrated, harvests: NDArray[np.void]
    ) -> Verdict:
        return Verdict(
            found.pages,
            found.lost,
            self._sensitivity(found, migrated),
            GuestOutcome(0, 0, 0),
            migrated.ended_early,
            downtime=self._downtime(migrated.migration, harvests),
            wrong_rings=found.wrong_rings,
            refusal=migrated.refusal.words if migrated.refusal else None,
            untested=migrated.untested,
            changes=found.changes,
            given_back=found.given_back,
            skips_free_pages=self.scenario.skips_free_pages,
        )

    def _sensitivity(self, found: Comparison, migrated: Migrated) -> Sensitivity:
        source = self.scenario.evidence_source(has_evidence=bool(found.evidence))
        if source is EvidenceSource.JOURNAL:
            return measure_sensitivity(
                found.evidence, migrated.all_sent_ns, found.running_destination
            )
        write_once = self._attempt.used_write_once_pages() if migrated.ram_is_comparable else 0
        huge_pages = self.scenario.sends_whole_pages and self._setup.machine.backend.has_huge_pages
        shows = self._setup.direct and not huge_pages
        guaranteed = source is not EvidenceSource.GUEST or shows
        return sensitivity_by_guest(write_once, source, guaranteed=guaranteed)

    def _downtime(self, migration: Migration, harvests: NDArray[np.void]) -> Downtime:
        return measure_downtime(
            migration.moments,
            harvests,
            migration.history[-1].downtime_s,
            migration.loading_ns,
            self._setup.max_downtime_s,
        )

    @property
    def _reports_rings(self) -> bool:
        """Whether the rings of the source are stopped and can be read after the migration."""
        return (
            self.scenario.stops_rings and bool(self.device.processes) and self._has_readable_rings
        )

    @property
    def _has_readable_rings(self) -> bool:
        """Whether rings have indices in RAM, at addresses that QEMU reports.

        A packed ring has no index. Behind an IOMMU, QEMU reports IOVAs.
        """
        return self._setup.machine.iommu is None and self._setup.device.facts.ring != "packed"

    @property
    def _is_third_party(self) -> bool:
        """Whether the device keeps no journal, and is outside QEMU."""
        return self._setup.device.facts.tracker is None and bool(self.device.processes)

    # Finishing ------------------------------------------------------------------------------------

    async def finish(self, proof: Proof) -> Proof:
        """Continue the guest, and add its findings to the verdict.

        Raises:
            UntestableError: the guest does not continue, although no page and no request was lost.
        """
        if not self.scenario.destination_can_continue:
            return proof
        verdict = proof.verdict
        if verdict.can_continue:
            guest = await continue_guest(
                self.pair,
                self.scenario,
                self._setup.requests_after,
                pages_are_lost=bool(verdict.lost),
            )
            proof = replace(proof, verdict=replace(verdict, guest=guest))
        if self._paused is None:
            return proof
        return await self.pair.guarded(self._settle(proof, self._paused))

    async def _settle(self, proof: Proof, paused: PausedRam) -> Proof:
        """Add to the verdict what has happened on the source since its guest was paused."""
        source, verdict, log_watch = self.pair.source, proof.verdict, self._attempt.log_watch
        paused_s = (proof.moments.get("STOP") or proof.history[-1].time_ns) / 1e9
        if self._is_third_party:
            left_s = paused_s + self._setup.settle_s - time.monotonic()
            _logger.info("watching the source's RAM for late DMA, %.1f s more", max(0.0, left_s))
            await asyncio.sleep(left_s)
        late: list[LostPage] = []
        settled_s = time.monotonic() - paused_s
        async with ram_files(source) as files:
            for ram in files:
                late += paused.written(ram, slots_in(ram, await slots_of(source, ram)))
        verdict = replace(
            verdict,
            lost=with_late_dma(verdict.lost, late),
            settled_s=settled_s,
            log=log_watch.evidence() if log_watch is not None else None,
        )
        return replace(proof, verdict=verdict, ram_map=with_lost(proof.ram_map, late))


def _harvests(evidence: Sequence[Evidence]) -> NDArray[np.void]:
    """Return the harvests of all devices, ordered by time."""
    none = np.empty(0, dtype=HARVEST)
    return np.sort(np.concatenate([none, *(each.harvests for each in evidence)]), order="time_ns")
