"""Compares all RAM of two paused QEMUs after a migration, however they were started.

What is compared is the physical map's RAM and ROM, range by range (`physical_map`), and, where both
QEMUs' processes can be read, those parts of a backend too that the map hides. The rest is told
as not compared, such as memory that is the same on both sides. Pages that the guest has given back
are counted by themselves (`discarded`). No device of ours takes part, so a difference is placed
(address, region, backend) and not attributed.
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

from dmaproof.errors import UntestableError, UsageError
from dmaproof.page_compare import Extent, differing_pages
from dmaproof.units import PAGE_BYTES

from ..arguments import AnyPath, path_of
from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..memory.copied_memory import PIECE_BYTES
from ..memory.guest_ram import GuestRam, guest_ram
from ..memory.physical_map import CommonRange, MapRegion, common_ranges, hidden_parts, is_backend
from ..memory.ram_blocks import RamBlock, block_of, known_tcg_loss, parse_ram_blocks
from ..qemu.attachment import attach
from ..qemu.machine import DESTINATION, SOURCE
from ..qemu.qemu import Qemu
from .discarded import Discarder, discarders, sort_differences
from .known_differences import known_difference
from .migrated import GuestHasRunError, has_run, require_migrated, require_paused
from .same_memory import is_same_memory

_NO_MIGRATION: Final = "no migration was expected, and so none was looked for"
_SAME_MEMORY: Final = "the same memory on both sides"
_LOOKED_AT: Final = 10_000
"""So many differing pages are looked into; more are only counted and mapped."""


@dataclass(frozen=True)
class Difference:
    """A page that differs. `gpa` is None in RAM that the physical map hides.

    `offset` is the page's in memory region `region`; `device` the DIMM that it is on, if any;
    `known` names an entry of `known_differences`, and `why` says what it says.
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

    `differing` are the numbers of its pages that differ, `discarded` of those that the guest gave
    back, and `undecided` of those that may be either.
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
    """Memory of `length` bytes that could not be compared, and why."""

    region: str
    offset: int
    length: int
    why: str


@dataclass(frozen=True)
class Side:
    """What was found of one of the QEMUs; `socket` is the path of its QMP socket.

    Of the RAM, `in_place_bytes` were read where they are, `copied_bytes` were copied from QEMU's
    process, and `saved_bytes` QEMU saved.
    """

    socket: str
    pid: int
    version: str
    status: str
    accelerator: str
    in_place_bytes: int
    copied_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Check:
    """The outcome; `differences` has the first pages that differ, `areas` know of all.

    `discarders` are the names of the source's devices by which its guest may give memory back.
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
        """How many pages were compared."""
        return sum(area.pages for area in self.areas)

    @property
    def differing(self) -> int:
        """How many of them differ."""
        return sum(len(area.differing) for area in self.areas)

    @property
    def discarded(self) -> int:
        """How many pages are not equal because the guest gave them back, and so need not be."""
        return sum(len(area.discarded) for area in self.areas)

    @property
    def undecided(self) -> int:
        """How many pages are not equal, and may have been given back or lost."""
        return sum(len(area.undecided) for area in self.areas)

    @property
    def known(self) -> int:
        """How many of those that differ are known to, after a sound migration."""
        return sum(difference.known is not None for difference in self.differences)

    @property
    def exit_code(self) -> int:
        """1 where pages differ that are not known to, 3 where they may, else 0."""
        if self.differing > self.known:
            return EXIT_LOST
        return EXIT_UNTESTED if self.undecided else EXIT_PASS

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        more = [
            f"{pages} {what}"
            for pages, what in (
                (self.known, "known to differ"),
                (self.undecided, "either lost or given back by the guest"),
                (self.discarded, "given back by the guest, of which nothing is proved"),
            )
            if pages
        ]
        if self.differing > self.known:
            also = f", and {', '.join(more)}" if more else ""
            return f"{self.differing - self.known} of {self.pages} pages differ{also}"
        if more:
            return f"{self.pages} pages compared: all equal but {', '.join(more)}"
        return f"every page equal: {self.pages} pages compared"


async def check(
    source: Qemu | AnyPath,
    destination: Qemu | AnyPath,
    *,
    expect_migration: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Check:
    """Compare the RAM of two QEMUs: handles of them, or the paths of their QMP sockets.

    They must be paused as their migration left them. Without `expect_migration`, any two paused
    QEMUs are compared, such as two that were started alike. `timeout_s` bounds the wait for each
    answer from a socket that is given by its path.

    Raises:
        UsageError: a path is none, or not of a QMP socket, both are the same QEMU's, or they are in
            the wrong order.
        NotMigratedError: no completed migration lies between them.
        GuestHasRunError: a guest has run since, or pages differ and it may have.
        UntestableError: the sizes or maps differ, or memory cannot be read.
    """
    given = {
        side: qemu if isinstance(qemu, Qemu) else path_of(side, qemu)
        for side, qemu in ((SOURCE, source), (DESTINATION, destination))
    }
    _refuse_one_socket(*given.values())
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(run_folder())
        sides = [
            qemu
            if isinstance(qemu, Qemu)
            else await stack.enter_async_context(attach(f"{side} QEMU", qemu, timeout_s=timeout_s))
            for side, qemu in given.items()
        ]
        return await compare_ram(sides[0], sides[1], folder, expect_migration=expect_migration)


def _refuse_one_socket(source: Qemu | Path, destination: Qemu | Path) -> None:
    if isinstance(source, Path) and isinstance(destination, Path):
        with contextlib.suppress(OSError):  # attaching to a socket says what is wrong with it
            if source.samefile(destination):
                raise UsageError(f"{source} is given for both sides")


async def compare_ram(
    source_qemu: Qemu,
    destination_qemu: Qemu,
    folder: Path,
    *,
    expect_migration: bool = True,
) -> Check:
    """Compare the RAM of two QEMUs, to each of which a QMP session is open.

    Whether they are comparable is looked at before and after the comparison: a guest that runs
    meanwhile changes what is compared.

    Args:
        source_qemu: the QEMU that the guest was migrated from.
        destination_qemu: the QEMU that the guest was migrated to.
        folder: where QEMUs whose memory cannot be read save it, a piece at a time.
        expect_migration: False where any two paused QEMUs are compared.

    Raises:
        UsageError: both are the same QEMU, or they are in the wrong order.
        NotMigratedError: no completed migration lies between them.
        GuestHasRunError: a guest has run since, or pages differ and it may have.
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
        comparison.refuse_what_proves_nothing()
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
            discarders=[it.name for it in comparison.discarders],
        )
        if outcome.exit_code and expect_migration and await has_run(qemus[1]) is None:
            raise GuestHasRunError(
                f"{outcome.sentence}, but whether the destination's guest has run since the "
                "migration is unknown: the accelerator does not tell. KVM and TCG do"
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
    """The RAM blocks of `qemu`; none where its human monitor does not tell them."""
    with contextlib.suppress(UntestableError):
        return parse_ram_blocks(await qemu.monitor("info ramblock"))
    return []


def _side(ram: GuestRam, status: str, accelerator: str) -> Side:
    in_place = sum(region.length for region in ram.shared)
    copied = sum(region.length for region in ram.copied)
    return Side(
        socket=str(ram.qemu.socket_path),
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
    """Two guests' RAM, and what has come out so far."""

    source: GuestRam
    destination: GuestRam
    accelerator: str
    discarders: Sequence[Discarder]
    blocks: Sequence[RamBlock]
    areas: list[ComparedArea] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)

    def refuse_what_proves_nothing(self) -> None:
        """Raise where the two are one, or of different size."""
        source, destination = self.source, self.destination
        # Where a supervisor opened the sockets, the process is the same for different QEMUs.
        if source.qemu.pid == destination.qemu.pid and source.hvas == destination.hvas:
            raise UsageError(f"both sockets are the same QEMU's (process {source.qemu.pid})")
        if source.length != destination.length:
            raise UntestableError(
                f"the source has {source.length // 1024} KiB of RAM in its physical map, the "
                f"destination {destination.length // 1024} KiB: they are not two sides of one "
                "migration"
            )

    async def compare(self) -> None:
        """Compare all that can be.

        Raises:
            UntestableError: none of the guest's RAM can be.
        """
        ranges = common_ranges(self.source.regions, self.destination.regions)
        same = {it for it in ranges if is_same_memory(self.source, self.destination, it)}
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
        """What may be behind the pages that are not equal."""
        notes = []
        if any(len(area.undecided) for area in self.areas):
            notes.append(
                "whether the undecided pages are lost or given back cannot be seen from outside: "
                "they may be zero because a huge page was filled in around them, or not sent "
                "because the guest hinted that they are free. Compare with RAM in a memfd, without "
                "transparent huge pages and with free-page-hint=off"
            )
        if any(it.hints for it in self.discarders) and any(len(it.differing) for it in self.areas):
            notes.append(
                "the source has a balloon with free-page-hint=on: a page that was sent, freed by "
                "the guest and hinted then differs as well. See whether pages differ with it off"
            )
        if self.accelerator != "kvm":
            notes += self._known_tcg_losses()
        return notes

    def _known_tcg_losses(self) -> list[str]:
        """A note for each RAM block in which QEMU's own TCG may have lost the pages that differ."""
        lost: Counter[str] = Counter()
        for area in self.areas:
            lost[area.region] += len(area.differing)
        lost.subtract(it.region for it in self.differences if it.known)
        notes = []
        for region in (region for region, pages in lost.items() if pages):
            block = block_of(region, self.blocks)
            why = known_tcg_loss(block, self.source.qemu.version) if block else None
            if block and why:
                notes.append(
                    "the source does not run under KVM. Under TCG this QEMU may lose what vCPUs "
                    f"write to RAM block {block.name}, because {why} (docs/kernel-findings.md): "
                    "see whether pages differ under KVM too"
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
                self.source.extent(common.source, gpa, length) as ours,
                self.destination.extent(common.destination, gpa, length) as theirs,
            ):
                differing = await asyncio.to_thread(
                    differing_pages, ours, theirs, length, PAGE_BYTES
                )
                pages = length // PAGE_BYTES
                found = await asyncio.to_thread(
                    sort_differences,
                    self.discarders,
                    (self.source, self.destination),
                    common,
                    gpa,
                    ours,
                    differing,
                    pages,
                )
                area = ComparedArea(gpa, common.source.name, offset + start, pages, *found)
                self._add(area, ours, theirs)

    async def _compare_hidden(self) -> None:
        """Compare what the physical map hides of each memory backend."""
        for name, size in self.source.backends.items():
            ours, theirs = (
                next((region for region in ram.regions if is_backend(region, name)), None)
                for ram in (self.source, self.destination)
            )
            if ours is None or theirs is None or self.destination.backends.get(name) != size:
                continue
            for begin, length in hidden_parts(self.source.regions, name, size):
                for start in range(begin, begin + length, PIECE_BYTES):
                    await self._compare_hidden_piece(
                        (ours, theirs), name, start, min(PIECE_BYTES, begin + length - start)
                    )

    async def _compare_hidden_piece(
        self, regions: tuple[MapRegion, MapRegion], name: str, start: int, length: int
    ) -> None:
        ours = await self.source.backend_extent(regions[0], start, length)
        theirs = await self.destination.backend_extent(regions[1], start, length)
        if ours is None or theirs is None:
            why = "hidden by the physical map, and QEMU saves only what that shows"
            self.not_compared.append(NotCompared(name, start, length, why))
            return
        if ours.offset == theirs.offset and os.path.sameopenfile(ours.fd, theirs.fd):
            self.not_compared.append(NotCompared(name, start, length, _SAME_MEMORY))
            return
        differing = await asyncio.to_thread(differing_pages, ours, theirs, length, PAGE_BYTES)
        self._add(ComparedArea(None, name, start, length // PAGE_BYTES, differing), ours, theirs)

    def _add(self, area: ComparedArea, ours: Extent, theirs: Extent) -> None:
        self.areas.append(area)
        for page in area.differing[: max(0, _LOOKED_AT - len(self.differences))]:
            start = int(page) * PAGE_BYTES
            page_of_source, page_of_destination = (
                os.pread(extent.fd, PAGE_BYTES, extent.offset + start) for extent in (ours, theirs)
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
