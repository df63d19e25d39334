"""Compare the RAM of two guests, page by page.

The comparison covers the RAM and ROM of the physical map, range by range (`physical_map`). If the
processes of both QEMUs can be read, it also covers the parts of a backend that the map hides. The
rest is reported as not compared, for example memory that is the same on both sides. Pages that the
guest has given back are counted separately (`discarded`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError, UsageError
from dmaproof.units import PAGE_BYTES

from ..memory.copied_memory import PIECE_BYTES
from ..memory.pages import Pages, differing_pages
from ..memory.physical_map import CommonRange, MapRegion, common_ranges, hidden_parts, is_backend
from ..memory.ram_blocks import block_of, known_tcg_loss
from .discarded import Discarder, Sorted, may_be_discarded, sort_differences
from .guest import Guest, LiveGuest
from .known_differences import known_difference
from .migrated import GuestHasRunError, GuestState, require_migrated, require_paused
from .outcome import Check, ComparedArea, Difference, NotCompared
from .same_memory import is_same_memory, is_same_part

_NO_MIGRATION: Final = "no migration was expected, so dmaproof did not check for one"
_SAME_MEMORY: Final = "the same memory on both sides"
MOST_INSPECTED: Final = 10_000
"""The most differing pages that are inspected; further ones are only counted and mapped."""


async def compare_guests(
    source: Guest, destination: Guest, *, expect_migration: bool = True
) -> Check:
    """Compare the RAM of two guests.

    dmaproof checks before and after the comparison that the guests are comparable, because a guest
    that runs during the comparison changes its RAM.

    Args:
        source: the guest before the migration.
        destination: the guest after the migration.
        expect_migration: False to compare any two paused guests.

    Raises:
        UsageError: both are the same QEMU, or they are in the wrong order.
        NotMigratedError: the QEMUs are not the two sides of a completed migration.
        GuestHasRunError: a guest has run since the migration, or pages differ and it may have run.
        UntestableError: the sizes or maps differ, or memory cannot be read.
    """
    # A snapshot has the content of another time, so it is not the same memory. Its file may also
    # have been deleted since, and ext4 gives the number of the inode to the next file.
    both_live = isinstance(source, LiveGuest) and isinstance(destination, LiveGuest)
    comparison = _Comparison(source, destination, seeks_same=both_live)
    if expect_migration or both_live:
        comparison.require_two_guests()
    await _require_comparable(source, destination, expect_migration)
    comparison.require_equal_sizes()
    began_s = time.monotonic()
    await comparison.compare()
    compare_s = time.monotonic() - began_s
    states = await _require_comparable(source, destination, expect_migration)
    outcome = Check(
        source=source.side(states[0]),
        destination=destination.side(states[1]),
        areas=comparison.areas,
        differences=comparison.differences,
        not_compared=comparison.not_compared,
        notes=[*([] if expect_migration else [_NO_MIGRATION]), *comparison.notes()],
        compare_s=compare_s,
        discarders=[device.name for device in source.discarders],
    )
    if outcome.exit_code and expect_migration and states[1].has_run is None:
        raise GuestHasRunError(
            f"{outcome.sentence}, but it is unknown whether the destination's guest has run "
            "since the migration: this accelerator does not report it. Use KVM or TCG"
        )
    return outcome


async def _require_comparable(
    source: Guest, destination: Guest, expect_migration: bool
) -> tuple[GuestState, GuestState]:
    states = await source.state(), await destination.state()
    if expect_migration:
        require_migrated(*states)
    else:
        for state in states:
            require_paused(state)
    return states


@dataclass
class _Comparison:
    """Two guests, and the findings so far.

    `seeks_same` says whether memory that is the same on both sides is left out.
    """

    source: Guest
    destination: Guest
    seeks_same: bool
    areas: list[ComparedArea] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)

    def require_two_guests(self) -> None:
        """Raise if both sides are the same QEMU."""
        source, destination = self.source, self.destination
        # If a supervisor opened the sockets, different QEMUs have the same process id.
        if (
            source.facts.pid == destination.facts.pid
            and source.ram.boot_id == destination.ram.boot_id
            and source.ram.hvas == destination.ram.hvas
        ):
            raise UsageError(
                f"both sides are the same QEMU (process {source.facts.pid}): give the source and "
                "the destination"
            )

    def require_equal_sizes(self) -> None:
        """Raise if the sides have RAM of different sizes."""
        source, destination = self.source.ram, self.destination.ram
        if source.length != destination.length:
            raise UntestableError(
                f"the source has {source.length // 1024} KiB of RAM in its physical map, the "
                f"destination {destination.length // 1024} KiB: they are not the two sides of one "
                "migration"
            )

    async def compare(self) -> None:
        """Compare all memory that can be compared.

        Raises:
            UntestableError: none of the guest's RAM can be compared.
        """
        ranges = common_ranges(self.source.ram.regions, self.destination.ram.regions)
        rams = self.source.ram, self.destination.ram
        same = {common for common in ranges if self.seeks_same and is_same_memory(*rams, common)}
        if same and not any(self._is_guest_ram(common) for common in ranges if common not in same):
            raise UntestableError(
                "source and destination have their RAM in the same file (x-ignore-shared?), so "
                "there is nothing to compare"
            )
        for common in ranges:
            if common in same:
                self._leave_out(common, 0, common.length, _SAME_MEMORY)
            else:
                await self._compare_range(common)
        for region in self.source.ram.regions:
            if region.kind == "ramd":
                self.not_compared.append(
                    NotCompared(region.name, region.offset, region.length, "a device's own memory")
                )
        await self._compare_hidden()

    def notes(self) -> list[str]:
        """Return possible reasons for the pages that are not equal."""
        notes = []
        if any(len(area.undecided) for area in self.areas):
            notes.append(
                "dmaproof cannot determine from outside whether the undecided pages were lost or "
                "given back: a page may be zero because the kernel filled in a huge page around "
                "it, or a page of a host whose pages are larger than 4 KiB, or unsent because the "
                "guest hinted that it is free. For a decision, repeat the check on a host with "
                "pages of 4 KiB, with RAM in a memfd, without transparent huge pages, and with "
                "free-page-hint=off"
            )
        any_differ = any(len(area.differing) for area in self.areas)
        if any_differ and any(device.hints for device in self.source.discarders):
            notes.append(
                "the source has a balloon with free-page-hint=on: a page that was sent, and then "
                "freed and hinted by the guest, differs without being lost. Check whether pages "
                "also differ with free-page-hint=off"
            )
        if self.source.facts.accelerator != "kvm":
            notes += self._known_tcg_losses()
        return notes

    def _known_tcg_losses(self) -> list[str]:
        """Return a note for each RAM block in which TCG itself may have lost differing pages."""
        lost: Counter[str] = Counter()
        for area in self.areas:
            lost[area.region] += len(area.differing)
        lost.subtract(difference.region for difference in self.differences if difference.known)
        notes = []
        for region in (region for region, pages in lost.items() if pages):
            block = block_of(region, self.source.blocks)
            why = block and known_tcg_loss(
                block,
                self.source.facts.version,
                can_postcopy="postcopy-ram" in self.source.capabilities,
            )
            if block and why:
                notes.append(
                    "the source does not use KVM. With TCG this QEMU may lose what vCPUs write to "
                    f"RAM block {block.name}, because {why} (qemu-findings.md in dmaproof's "
                    "documentation). Check whether pages also differ under KVM"
                )
        return notes

    def _is_guest_ram(self, common: CommonRange) -> bool:
        return any(is_backend(common.source, name) for name in self.source.ram.backends)

    def _leave_out(self, common: CommonRange, start: int, length: int, why: str) -> None:
        offset = common.source.offset + common.gpa - common.source.gpa + start
        self.not_compared.append(NotCompared(common.source.name, offset, length, why))

    async def _compare_range(self, common: CommonRange) -> None:
        whole = common.length // PAGE_BYTES * PAGE_BYTES
        offset = common.source.offset + common.gpa - common.source.gpa
        if whole < common.length:
            self._leave_out(common, whole, common.length - whole, "less than a page")
        in_place = (
            common.source in self.source.ram.files
            and common.destination in self.destination.ram.files
        )
        step = whole if in_place else PIECE_BYTES
        discarders = self._discarders_of(common.source)
        for start in range(0, whole, max(step, 1)):
            gpa, count = common.gpa + start, min(step, whole - start) // PAGE_BYTES
            async with (
                self.source.ram.pages(common.source, gpa, count) as sent,
                self.destination.ram.pages(common.destination, gpa, count) as received,
            ):
                found = await asyncio.to_thread(_compare_pages, discarders, gpa, sent, received)
                area = ComparedArea(gpa, common.source.name, offset + start, count, *found)
                self._add(area, sent, received)

    def _discarders_of(self, region: MapRegion) -> Sequence[Discarder]:
        return self.source.discarders if may_be_discarded(self.source.ram, region) else ()

    async def _compare_hidden(self) -> None:
        """Compare the parts of each memory backend that the physical map hides."""
        for name, size in self.source.ram.backends.items():
            source, destination = (
                next((region for region in ram.regions if is_backend(region, name)), None)
                for ram in (self.source.ram, self.destination.ram)
            )
            if not source or not destination or self.destination.ram.backends.get(name) != size:
                continue
            for begin, length in hidden_parts(self.source.ram.regions, name, size):
                for start in range(begin, begin + length, PIECE_BYTES):
                    await self._compare_hidden_piece(
                        (source, destination),
                        name,
                        start,
                        min(PIECE_BYTES, begin + length - start),
                    )

    async def _compare_hidden_piece(
        self, regions: tuple[MapRegion, MapRegion], name: str, start: int, length: int
    ) -> None:
        count = length // PAGE_BYTES
        sent = await self.source.ram.hidden_pages(regions[0], start, count)
        received = await self.destination.ram.hidden_pages(regions[1], start, count)
        if sent is None or received is None:
            why = "hidden by the physical map; QEMU can save only memory that the map shows"
            self.not_compared.append(NotCompared(name, start, length, why))
            return
        if self.seeks_same and is_same_part(self.source.ram, self.destination.ram, regions, start):
            self.not_compared.append(NotCompared(name, start, length, _SAME_MEMORY))
            return
        found = await asyncio.to_thread(differing_pages, sent, received)
        self._add(ComparedArea(None, name, start, count, found), sent, received)

    def _add(self, area: ComparedArea, sent: Pages, received: Pages) -> None:
        self.areas.append(area)
        for page in area.differing[: max(0, MOST_INSPECTED - len(self.differences))]:
            start = int(page) * PAGE_BYTES
            before, after = sent.content(int(page)), received.content(int(page))
            differs = bytes_differing(before, after) if before and after else None
            gpa = None if area.gpa is None else area.gpa + start
            known = (
                None
                if differs is None
                else known_difference(gpa, differs, self.source.facts.accelerator)
            )
            self.differences.append(
                Difference(
                    gpa=gpa,
                    region=area.region,
                    offset=area.offset + start,
                    bytes_differing=None if differs is None else len(differs),
                    device=self._dimm_at(gpa),
                    known=known.name if known else None,
                    why=known.why if known else None,
                )
            )

    def _dimm_at(self, gpa: int | None) -> str | None:
        for name, (base, size) in self.source.ram.dimms.items():
            if gpa is not None and base <= gpa < base + size:
                return name
        return None


def _compare_pages(
    discarders: Sequence[Discarder], gpa: int, sent: Pages, received: Pages
) -> Sorted:
    return sort_differences(discarders, gpa, sent, received, differing_pages(sent, received))


def bytes_differing(sent: bytes, received: bytes) -> NDArray[np.int64]:
    """Return the offsets of the bytes that differ."""
    return np.flatnonzero(
        np.frombuffer(sent, dtype=np.uint8) != np.frombuffer(received, dtype=np.uint8)
    )
