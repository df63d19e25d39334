"""Compare all RAM of two paused QEMUs after a migration, regardless of how they were started.

The comparison covers the RAM and ROM of the physical map, range by range (`physical_map`). If the
processes of both QEMUs can be read, it also covers the parts of a backend that the map hides. The
rest is reported as not compared, for example memory that is the same on both sides. Pages that the
guest has given back are counted separately (`discarded`). No device of dmaproof takes part, so a
difference is located (address, region, backend), but its cause is not determined.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import DmaproofError, UntestableError, UsageError
from dmaproof.page_compare import Extent, differing_pages
from dmaproof.units import PAGE_BYTES

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..memory.copied_memory import PIECE_BYTES
from ..memory.guest_ram import GuestRam, guest_ram
from ..memory.physical_map import CommonRange, MapRegion, common_ranges, hidden_parts, is_backend
from ..memory.ram_blocks import RamBlock, block_of, known_tcg_loss, parse_ram_blocks
from ..qemu.machine import DESTINATION, SOURCE
from ..qemu.opening import AnyQemu, open_qemu, require_openable
from ..qemu.qemu import Qemu
from .discarded import Discarder, discarders, sort_differences
from .known_differences import known_difference
from .migrated import GuestHasRunError, has_run, require_migrated, require_paused
from .same_memory import is_same_memory

_NO_MIGRATION: Final = "no migration was expected, so dmaproof did not check for one"
_SAME_MEMORY: Final = "the same memory on both sides"
_MOST_INSPECTED: Final = 10_000
"""The most differing pages that are inspected; further ones are only counted and mapped."""
_MOST_NAMED: Final = 10


class RamDiffersError(DmaproofError, AssertionError):
    """Pages differ; the message names the first ones. Test frameworks report it as a failure."""


@dataclass(frozen=True)
class Difference:
    """A page that differs. `gpa` is None in RAM that the physical map hides.

    `offset` is that of the page in memory region `region`. `device` is the DIMM that contains the
    page, if any. `known` names an entry of `known_differences`, and `why` is its explanation.
    """

    gpa: int | None
    region: str
    offset: int
    bytes_differing: int
    device: str | None = None
    known: str | None = None
    why: str | None = None


def _no_pages() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class ComparedArea:
    """A run of pages that was compared.

    `differing` are the numbers of its pages that differ, `discarded` those of pages that the guest
    gave back, and `undecided` those of pages that may be either.
    """

    gpa: int | None
    region: str
    offset: int
    pages: int
    differing: NDArray[np.int64]
    discarded: NDArray[np.int64] = field(default_factory=_no_pages)
    undecided: NDArray[np.int64] = field(default_factory=_no_pages)


@dataclass(frozen=True)
class NotCompared:
    """Memory of `length` bytes that was not compared, and the reason."""

    region: str
    offset: int
    length: int
    why: str


@dataclass(frozen=True)
class Side:
    """The state of one of the QEMUs; `address` says where it was found (see `Qemu`).

    Of its RAM, `in_place_bytes` were read in place, `copied_bytes` were copied from QEMU's process,
    and `saved_bytes` were saved by QEMU.
    """

    address: str
    pid: int
    version: str
    status: str
    accelerator: str
    in_place_bytes: int
    copied_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Check:
    """The outcome; `differences` has the first pages that differ, and `areas` has all of them.

    `discarders` are the names of the source's devices through which its guest may give memory back.
    """

    source: Side
    destination: Side
    areas: Sequence[ComparedArea]
    differences: Sequence[Difference]
    not_compared: Sequence[NotCompared]
    notes: Sequence[str]
    compare_s: float
    discarders: Sequence[str] = ()

    @property
    def pages(self) -> int:
        """The number of pages that were compared."""
        return sum(area.pages for area in self.areas)

    @property
    def differing(self) -> int:
        """The number of pages that differ."""
        return sum(len(area.differing) for area in self.areas)

    @property
    def discarded(self) -> int:
        """The number of pages that may differ because the guest gave them back."""
        return sum(len(area.discarded) for area in self.areas)

    @property
    def undecided(self) -> int:
        """The number of pages that are not equal and were either given back or lost."""
        return sum(len(area.undecided) for area in self.areas)

    @property
    def known(self) -> int:
        """The number of pages that differ, but are known to differ after a correct migration."""
        return sum(difference.known is not None for difference in self.differences)

    @property
    def exit_code(self) -> int:
        """1 if pages differ that are not known to differ, 3 if that is undecided, else 0."""
        if self.differing > self.known:
            return EXIT_LOST
        return EXIT_UNTESTED if self.undecided else EXIT_PASS

    def require_equal(self) -> None:
        """Raise unless the check has passed.

        Raises:
            RamDiffersError: pages differ.
            UntestableError: it is undecided whether pages were lost.
        """
        if self.exit_code == EXIT_UNTESTED:
            raise UntestableError(self.sentence)
        if self.exit_code:
            shown = [
                f"  {difference.region} +{difference.offset:#x}"
                + ("" if difference.gpa is None else f" (GPA {difference.gpa:#x})")
                for difference in self.differences
                if difference.known is None
            ]
            more = ["  …"] if self.differing - self.known > _MOST_NAMED else []
            raise RamDiffersError("\n".join([self.sentence, *shown[:_MOST_NAMED], *more]))

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        more = [
            f"{pages} {what}"
            for pages, what in (
                (self.known, "known to differ"),
                (self.undecided, "either lost or given back by the guest"),
                (self.discarded, "given back by the guest, about which the check proves nothing"),
            )
            if pages
        ]
        if self.differing > self.known:
            also = f"; in addition, {', '.join(more)}" if more else ""
            return f"{self.differing - self.known} of {self.pages} pages differ{also}"
        if more:
            return f"{self.pages} pages compared: all are equal except {', '.join(more)}"
        return f"all pages are equal: {self.pages} pages compared"


async def check(
    source: AnyQemu,
    destination: AnyQemu,
    *,
    expect_migration: bool = True,
    resume: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Check:
    """Compare all RAM of two QEMUs after a migration.

    Both must be paused, as their migration left them.

    Args:
        source: the QEMU that the guest was migrated from: its handle, the path of a QMP socket, or
            an object that executes QMP commands, such as a QEMUMachine or a QMPClient.
        destination: the QEMU that the guest was migrated to.
        expect_migration: False to compare any two paused QEMUs, for example two that were started
            with the same options.
        resume: whether to continue the guest of the destination after the comparison.
        timeout_s: bounds the wait for each answer of a QEMU that is not given as a handle.

    Raises:
        UsageError: an argument is not a QEMU, both are the same QEMU, or they are in the wrong
            order.
        NotMigratedError: the QEMUs are not the two sides of a completed migration.
        GuestHasRunError: a guest has run since the migration, or pages differ and it may have run.
        UntestableError: the sizes or maps differ, or memory cannot be read.

    Example::

        (await check("/run/source.qmp", "/run/destination.qmp")).require_equal()
    """
    given = {SOURCE: source, DESTINATION: destination}
    for side, qemu in given.items():
        require_openable(side, qemu)
    _refuse_one_socket(source, destination)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(run_folder())
        sides = [
            await stack.enter_async_context(open_qemu(f"{side} QEMU", qemu, timeout_s=timeout_s))
            for side, qemu in given.items()
        ]
        outcome = await compare_ram(sides[0], sides[1], folder, expect_migration=expect_migration)
        if resume:
            await sides[1].qmp.execute("cont")
        return outcome


def _refuse_one_socket(source: AnyQemu, destination: AnyQemu) -> None:
    if isinstance(source, (str, os.PathLike)) and isinstance(destination, (str, os.PathLike)):
        with contextlib.suppress(OSError):  # attaching to the socket reports the problem
            if Path(source).samefile(destination):
                raise UsageError(
                    f"{source} is given for both sides: give the socket of the source and that of "
                    "the destination"
                )


async def compare_ram(
    source_qemu: Qemu,
    destination_qemu: Qemu,
    folder: Path,
    *,
    expect_migration: bool = True,
) -> Check:
    """Compare the RAM of two QEMUs, each of which has an open QMP session.

    dmaproof checks before and after the comparison that the QEMUs are comparable, because a guest
    that runs during the comparison changes its RAM.

    Args:
        source_qemu: the QEMU that the guest was migrated from.
        destination_qemu: the QEMU that the guest was migrated to.
        folder: where a QEMU whose memory cannot be read saves it, one piece at a time.
        expect_migration: False to compare any two paused QEMUs.

    Raises:
        UsageError: both are the same QEMU, or they are in the wrong order.
        NotMigratedError: the QEMUs are not the two sides of a completed migration.
        GuestHasRunError: a guest has run since the migration, or pages differ and it may have run.
        UntestableError: the sizes or maps differ, or memory cannot be read.
    """
    qemus = (source_qemu, destination_qemu)
    async with contextlib.AsyncExitStack() as stack:
        accelerators = [await _accelerator(qemu) for qemu in qemus]
        source, destination = [
            await stack.enter_async_context(guest_ram(qemu, folder)) for qemu in qemus
        ]
        comparison = _Comparison(
            source,
            destination,
            accelerators[0],
            discarders=await discarders(qemus[0]),
            blocks=await _ram_blocks(qemus[0]),
        )
        comparison.require_two_equal_sizes()
        await _require_comparable(qemus, expect_migration)
        began_s = time.monotonic()
        await comparison.compare()
        compare_s = time.monotonic() - began_s
        await _require_comparable(qemus, expect_migration)
        sides = [
            _side(ram, await ram.qemu.status(), accelerator)
            for ram, accelerator in zip((source, destination), accelerators, strict=True)
        ]
        outcome = Check(
            source=sides[0],
            destination=sides[1],
            areas=comparison.areas,
            differences=comparison.differences,
            not_compared=comparison.not_compared,
            notes=[*([] if expect_migration else [_NO_MIGRATION]), *comparison.notes()],
            compare_s=compare_s,
            discarders=[device.name for device in comparison.discarders],
        )
        if outcome.exit_code and expect_migration and await has_run(qemus[1]) is None:
            raise GuestHasRunError(
                f"{outcome.sentence}, but it is unknown whether the destination's guest has run "
                "since the migration: this accelerator does not report it. Use KVM or TCG"
            )
        return outcome


async def _require_comparable(qemus: Sequence[Qemu], expect_migration: bool) -> None:
    if expect_migration:
        await require_migrated(*qemus)
        return
    for qemu in qemus:
        await require_paused(qemu)


async def _accelerator(qemu: Qemu) -> str:
    answer = await qemu.qmp.execute("query-kvm")
    return "kvm" if answer["enabled"] else "other"


async def _ram_blocks(qemu: Qemu) -> list[RamBlock]:
    """Return the RAM blocks of `qemu`; empty if its human monitor does not report them."""
    with contextlib.suppress(UntestableError):
        return parse_ram_blocks(await qemu.monitor("info ramblock"))
    return []


def _side(ram: GuestRam, status: str, accelerator: str) -> Side:
    in_place = sum(region.length for region in ram.shared)
    copied = sum(region.length for region in ram.copied)
    return Side(
        address=ram.qemu.address,
        pid=ram.qemu.pid,
        version=ram.qemu.version,
        status=status,
        accelerator=accelerator,
        in_place_bytes=in_place,
        copied_bytes=copied,
        saved_bytes=ram.length - in_place - copied,
    )


@dataclass
class _Comparison:
    """The RAM of two guests, and the findings so far."""

    source: GuestRam
    destination: GuestRam
    accelerator: str
    discarders: Sequence[Discarder]
    blocks: Sequence[RamBlock]
    areas: list[ComparedArea] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)

    def require_two_equal_sizes(self) -> None:
        """Raise if both sides are the same QEMU, or have RAM of different sizes."""
        source, destination = self.source, self.destination
        # If a supervisor opened the sockets, different QEMUs have the same process id.
        if source.qemu.pid == destination.qemu.pid and source.hvas == destination.hvas:
            raise UsageError(
                f"both sockets belong to the same QEMU (process {source.qemu.pid}): give a socket "
                "of the source and one of the destination"
            )
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
        ranges = common_ranges(self.source.regions, self.destination.regions)
        same = {
            common for common in ranges if is_same_memory(self.source, self.destination, common)
        }
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
        for region in self.source.regions:
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
                "it, or unsent because the guest hinted that it is free. For a decision, repeat "
                "the check with RAM in a memfd, without transparent huge pages, and with "
                "free-page-hint=off"
            )
        any_differ = any(len(area.differing) for area in self.areas)
        if any_differ and any(device.hints for device in self.discarders):
            notes.append(
                "the source has a balloon with free-page-hint=on: a page that was sent, and then "
                "freed and hinted by the guest, differs without being lost. Check whether pages "
                "also differ with free-page-hint=off"
            )
        if self.accelerator != "kvm":
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
            block = block_of(region, self.blocks)
            why = known_tcg_loss(block, self.source.qemu.version) if block else None
            if block and why:
                notes.append(
                    "the source does not use KVM. With TCG this QEMU may lose what vCPUs write to "
                    f"RAM block {block.name}, because {why} (kernel-findings.md in dmaproof's "
                    "documentation). Check whether pages also differ under KVM"
                )
        return notes

    def _is_guest_ram(self, common: CommonRange) -> bool:
        return any(is_backend(common.source, name) for name in self.source.backends)

    def _leave_out(self, common: CommonRange, start: int, length: int, why: str) -> None:
        offset = common.source.offset + common.gpa - common.source.gpa + start
        self.not_compared.append(NotCompared(common.source.name, offset, length, why))

    async def _compare_range(self, common: CommonRange) -> None:
        whole = common.length // PAGE_BYTES * PAGE_BYTES
        offset = common.source.offset + common.gpa - common.source.gpa
        if whole < common.length:
            self._leave_out(common, whole, common.length - whole, "less than a page")
        both_shared = (
            common.source in self.source.shared and common.destination in self.destination.shared
        )
        step = whole if both_shared else PIECE_BYTES
        for start in range(0, whole, max(step, 1)):
            gpa, length = common.gpa + start, min(step, whole - start)
            async with (
                self.source.extent(common.source, gpa, length) as sent,
                self.destination.extent(common.destination, gpa, length) as received,
            ):
                differing = await asyncio.to_thread(
                    differing_pages, sent, received, length, PAGE_BYTES
                )
                pages = length // PAGE_BYTES
                found = await asyncio.to_thread(
                    sort_differences,
                    self.discarders,
                    (self.source, self.destination),
                    common,
                    gpa,
                    sent,
                    differing,
                    pages,
                )
                area = ComparedArea(gpa, common.source.name, offset + start, pages, *found)
                self._add(area, sent, received)

    async def _compare_hidden(self) -> None:
        """Compare the parts of each memory backend that the physical map hides."""
        for name, size in self.source.backends.items():
            source, destination = (
                next((region for region in ram.regions if is_backend(region, name)), None)
                for ram in (self.source, self.destination)
            )
            if not source or not destination or self.destination.backends.get(name) != size:
                continue
            for begin, length in hidden_parts(self.source.regions, name, size):
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
        sent = await self.source.backend_extent(regions[0], start, length)
        received = await self.destination.backend_extent(regions[1], start, length)
        if sent is None or received is None:
            why = "hidden by the physical map; QEMU can save only memory that the map shows"
            self.not_compared.append(NotCompared(name, start, length, why))
            return
        if sent.offset == received.offset and os.path.sameopenfile(sent.fd, received.fd):
            self.not_compared.append(NotCompared(name, start, length, _SAME_MEMORY))
            return
        differing = await asyncio.to_thread(differing_pages, sent, received, length, PAGE_BYTES)
        area = ComparedArea(None, name, start, length // PAGE_BYTES, differing)
        self._add(area, sent, received)

    def _add(self, area: ComparedArea, sent: Extent, received: Extent) -> None:
        self.areas.append(area)
        for page in area.differing[: max(0, _MOST_INSPECTED - len(self.differences))]:
            start = int(page) * PAGE_BYTES
            page_of_source, page_of_destination = (
                os.pread(extent.fd, PAGE_BYTES, extent.offset + start)
                for extent in (sent, received)
            )
            differs = np.flatnonzero(
                np.frombuffer(page_of_source, dtype=np.uint8)
                != np.frombuffer(page_of_destination, dtype=np.uint8)
            )
            gpa = None if area.gpa is None else area.gpa + start
            known = known_difference(gpa, differs, self.accelerator)
            self.differences.append(
                Difference(
                    gpa=gpa,
                    region=area.region,
                    offset=area.offset + start,
                    bytes_differing=len(differs),
                    device=self._dimm_at(gpa),
                    known=known.name if known else None,
                    why=known.why if known else None,
                )
            )

    def _dimm_at(self, gpa: int | None) -> str | None:
        for name, (base, size) in self.source.dimms.items():
            if gpa is not None and base <= gpa < base + size:
                return name
        return None
