"""Compare the RAM of both guests after a migration, before either guest continues."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from dmaproof.errors import UntestableError
from dmaproof.evidence import Evidence, Slot

from ..devices.vhost_recorder import KernelLogs
from ..memory.ram import RamFile, slots_of
from ..migration.attempt import Attempt
from ..migration.pair import QemuPair
from ..migration.scenarios.base import Scenario
from .attribution import (
    LostPage,
    attribute,
    blame_discarded_bits,
    blame_early_bits,
    with_kernel_logs,
)
from .changes import Changes, GuestPages, RunningDestination
from .free_pages import without_free_pages
from .late_dma import PausedRam
from .model import Migrated
from .ram_map import RamMap, map_proof
from .rings import ReadRam, Ring, stopped_rings


@dataclass
class Comparison:
    """The findings of the comparison.

    `slots` are the guest's memory slots. `evidence` is the device's evidence, with these slots.
    `paused` holds digests of the source's RAM at the comparison. It is None if the source continued
    or if both sides share memory. `given_back` counts the pages that were not compared because the
    guest has given them back. `running_destination` and `changes` are about a destination that ran
    before the comparison. `guest_pages` are the pages that QEMU may have skipped as free.
    `kernel_logs` is what the kernel has logged, if there is a recorder.
    """

    evidence: Sequence[Evidence]
    pages: int = 0
    lost: list[LostPage] = field(default_factory=list)
    maps: list[RamMap] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    wrong_rings: Sequence[Ring] = ()
    paused: PausedRam | None = None
    running_destination: RunningDestination | None = None
    guest_pages: GuestPages | None = None
    changes: Changes | None = None
    given_back: int = 0
    kernel_logs: KernelLogs | None = None


async def compare_guests(
    pair: QemuPair,
    scenario: Scenario,
    attempt: Attempt,
    migrated: Migrated,
    *,
    reports_rings: bool,
) -> Comparison:
    """Compare every page, as `scenario` defines it, and also the rings if QEMU `reports_rings`.

    Raises:
        UntestableError: the RAM or the device's evidence cannot be read.
    """
    evidence = await pair.device.evidence(pair.source_side) if scenario.has_journal else []
    known = evidence[0].slots if evidence else []
    found = Comparison(evidence)
    if scenario.destination_runs and migrated.ram_is_comparable:
        written = await pair.device.evidence(pair.destination_side)
        found.running_destination = RunningDestination(written, _declared_pages(pair))
    if scenario.skips_free_pages:
        found.guest_pages = _declared_pages(pair)
    reporting = pair.source if migrated.refusal else pair.destination
    async with attempt.source_ram() as sources, attempt.destination_ram() as destinations:
        _require_same_backends(sources, destinations)
        scenario.require_arrival(sources, destinations)
        if migrated.ram_is_comparable and _nothing_shared(sources, destinations):
            found.paused = PausedRam(sources)
        for source, destination in zip(sources, destinations, strict=True):
            slots = known or await slots_of(reporting, source)
            found.slots += slots
            if migrated.ram_is_comparable:
                lost = _lost_pages(found, scenario, slots, source, destination)
                if migrated.ended_early:
                    lost = without_hold_pages(lost, pair.hold_pages)
                found.maps.append(map_proof(slots, evidence, lost, source, migrated.all_sent_ns))
                found.lost += lost
                found.pages += source.pages
        found.pages -= found.given_back
        if reports_rings:
            rams = {pair.source_side: _reader(found.slots, sources, sources)}
            if migrated.source_continued:
                rams[pair.destination_side] = _reader(found.slots, sources, destinations)
            rings = await stopped_rings(pair.source.qmp, rams)
            found.wrong_rings = [ring for ring in rings if _is_wrong(ring, pair.destination_side)]
    if evidence and not known:
        found.evidence = [replace(each, slots=found.slots) for each in evidence]
    if attempt.log_watch is not None:
        found.lost = blame_early_bits(found.lost, attempt.log_watch.evidence())
        found.lost = blame_discarded_bits(found.lost, attempt.discarded_bits)
    found.kernel_logs = pair.device.kernel_logs(pair.source_side)
    if found.kernel_logs is not None:
        found.lost = with_kernel_logs(found.lost, found.kernel_logs)
    return found


def _declared_pages(pair: QemuPair) -> GuestPages:
    return GuestPages(pair.source_guest.own_pages, pair.hold_pages)


def without_hold_pages(lost: Sequence[LostPage], hold_pages: Container[int]) -> list[LostPage]:
    """Return the `lost` pages except the hold pages, for a migration that ended early.

    QEMU itself writes to the hold pages (`migration.hold`), perhaps after it sent everything.
    """
    return [page for page in lost if page.gpa not in hold_pages]


def _require_same_backends(sources: Sequence[RamFile], destinations: Sequence[RamFile]) -> None:
    if [ram.backend for ram in sources] != [ram.backend for ram in destinations]:
        raise UntestableError("source and destination do not have the same memory backends")


def _nothing_shared(sources: Sequence[RamFile], destinations: Sequence[RamFile]) -> bool:
    pairs = zip(sources, destinations, strict=True)
    return all(source.inode != destination.inode for source, destination in pairs)


def _lost_pages(
    found: Comparison,
    scenario: Scenario,
    slots: Sequence[Slot],
    source: RamFile,
    destination: RamFile,
) -> list[LostPage]:
    differing = scenario.differing_pages(source, destination)
    is_given_back = scenario.given_back(differing, source)
    compared = differing[~is_given_back]
    found.given_back += int(is_given_back.sum())
    if found.running_destination is not None:
        compared, changes = found.running_destination.explain(compared, source, destination, slots)
        found.changes = (found.changes or Changes()) + changes
    if found.guest_pages is not None:
        not_free = without_free_pages(compared, source, slots, found.guest_pages, found.evidence)
        found.given_back += len(compared) - len(not_free)
        compared = not_free
    blame = scenario.blame_without_journal
    return attribute(compared, source, destination, slots, found.evidence, blame)


def _is_wrong(ring: Ring, destination_side: str) -> bool:
    answer_counts = ring.side != destination_side
    return not ring.is_consistent or (answer_counts and not ring.is_answered_right)


def _reader(slots: Sequence[Slot], known: Sequence[RamFile], files: Sequence[RamFile]) -> ReadRam:
    """Return a reader by GPA of the RAM in `files`.

    Each of the `files` replaces the one of the `known` files to which the `slots` refer.
    """
    by_inode = {(ram.device, ram.inode): file for ram, file in zip(known, files, strict=True)}

    def read(gpa: int, length: int) -> bytes | None:
        for slot in slots:
            if slot.gpa <= gpa and gpa + length <= slot.gpa + slot.length:
                file = by_inode[slot.device, slot.inode]
                return file.read(slot.file_offset + gpa - slot.gpa, length)
        return None

    return read
