"""Compares all RAM of two paused QEMUs after a migration, however they were started.

What is compared is the physical map's RAM and ROM, range by range (`physical_map`), and, where both
QEMUs' processes can be read, those parts of a backend too that the map hides. The rest is told
as not compared. No device of ours takes part, so a difference is placed (address, region, backend)
and not attributed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError, UsageError
from dmaproof.page_compare import Extent, differing_pages

from ..arguments import AnyPath, path_of
from ..processes.attachment import AttachedQemu, attach
from ..processes.run_folder import run_folder
from ..processes.timeout import DEFAULT_TIMEOUT_S
from ..ram import PAGE_BYTES
from ..verdict import EXIT_LOST, EXIT_PASS
from .copied_memory import PIECE_BYTES
from .guest_ram import GuestRam, guest_ram
from .known_differences import known_difference
from .migrated import GuestHasRunError, has_run, require_migrated, require_paused
from .physical_map import CommonRange, MapRegion, common_ranges, hidden_parts, is_backend

_NO_MIGRATION: Final = "no migration was expected, and so none was looked for"
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


@dataclass(frozen=True)
class ComparedArea:
    """A run of pages that was compared; `differing` are the numbers of its pages that differ."""

    gpa: int | None
    region: str
    offset: int
    pages: int
    differing: NDArray[np.int64]


@dataclass(frozen=True)
class NotCompared:
    """Memory of `length` bytes that could not be compared, and why."""

    region: str
    offset: int
    length: int
    why: str


@dataclass(frozen=True)
class Side:
    """What was found at one of the sockets.

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
    """The outcome; `differences` has the first pages that differ, `areas` know of all."""

    source: Side
    destination: Side
    areas: Sequence[ComparedArea]
    differences: Sequence[Difference]
    not_compared: Sequence[NotCompared]
    notes: Sequence[str]
    compare_s: float

    @property
    def pages(self) -> int:
        """How many pages were compared."""
        return sum(area.pages for area in self.areas)

    @property
    def differing(self) -> int:
        """How many of them differ."""
        return sum(len(area.differing) for area in self.areas)

    @property
    def known(self) -> int:
        """How many of these are known to differ after a sound migration."""
        return sum(difference.known is not None for difference in self.differences)

    @property
    def exit_code(self) -> int:
        """0 where nothing differs but what is known to, else 1."""
        return EXIT_LOST if self.differing > self.known else EXIT_PASS

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        known = f", and {self.known} more that are known to differ" if self.known else ""
        if self.differing > self.known:
            return f"{self.differing - self.known} of {self.pages} pages differ{known}"
        if self.known:
            return f"{self.pages} pages compared: all equal but {self.known} known to differ"
        return f"every page equal: {self.pages} pages compared"


async def check(
    source_socket: AnyPath,
    destination_socket: AnyPath,
    *,
    expect_migration: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Check:
    """Compare the RAM of the QEMUs behind two QMP sockets.

    They must be paused as their migration left them. Without `expect_migration`, any two paused
    QEMUs are compared, such as two that were started alike. `timeout_s` bounds the wait for each of
    their answers.

    Raises:
        UsageError: a path is none, or not of a QMP socket, both are the same QEMU's, or they are in
            the wrong order.
        NotMigratedError: no completed migration lies between them.
        GuestHasRunError: a guest has run since, or pages differ and it may have.
        UntestableError: the sizes or maps differ, or memory cannot be read.
    """
    source_socket = path_of("source", source_socket)
    destination_socket = path_of("destination", destination_socket)
    with contextlib.suppress(OSError):  # what is wrong with a socket, attaching to it tells
        if source_socket.samefile(destination_socket):
            raise UsageError(f"{source_socket} is given for both sides")
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(run_folder())
        qemus = [
            await stack.enter_async_context(attach(name, path, timeout_s=timeout_s))
            for name, path in (
                ("source QEMU", source_socket),
                ("destination QEMU", destination_socket),
            )
        ]
        accelerators = [await _accelerator(qemu) for qemu in qemus]
        source, destination = [
            await stack.enter_async_context(guest_ram(qemu, folder)) for qemu in qemus
        ]
        comparison = _Comparison(source, destination, accelerators[0])
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
        )
        if outcome.exit_code and expect_migration and await has_run(qemus[1]) is None:
            raise GuestHasRunError(
                f"{outcome.sentence}, but whether the destination's guest has run since the "
                "migration is unknown: the accelerator does not tell. KVM and TCG do"
            )
        return outcome


async def _require_comparable(qemus: Sequence[AttachedQemu], expect_migration: bool) -> None:
    if expect_migration:
        await require_migrated(*qemus)
        return
    for qemu in qemus:
        await require_paused(qemu)


async def _accelerator(qemu: AttachedQemu) -> str:
    answer = await qemu.qmp.execute("query-kvm")
    return "kvm" if answer["enabled"] else "other"


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
    areas: list[ComparedArea] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)

    def refuse_what_proves_nothing(self) -> None:
        """Raise where the two are one, or of different size."""
        source, destination = self.source, self.destination
        # Where a supervisor opened the sockets, the process is the same for different QEMUs.
        if source.qemu.pid == destination.qemu.pid and source.hvas == destination.hvas:
            raise UsageError(f"both sockets are the same QEMU's (process {source.qemu.pid})")
        if _files(source) & _files(destination):
            raise UntestableError(
                "source and destination have their RAM in the same file (x-ignore-shared?), so "
                "there is nothing to compare"
            )
        if source.length != destination.length:
            raise UntestableError(
                f"the source has {source.length // 1024} KiB of RAM in its physical map, the "
                f"destination {destination.length // 1024} KiB: they are not two sides of one "
                "migration"
            )

    async def compare(self) -> None:
        """Compare all that can be."""
        for common in common_ranges(self.source.regions, self.destination.regions):
            await self._compare_range(common)
        for region in self.source.regions:
            if region.kind == "ramd":
                self.not_compared.append(
                    NotCompared(region.name, region.offset, region.length, "a device's own memory")
                )
        await self._compare_hidden()

    def notes(self) -> list[str]:
        """What may be behind differences that are not known."""
        if self.accelerator == "kvm" or all(it.known for it in self.differences):
            return []
        return [
            "the source does not run under KVM. Under TCG QEMU itself may lose what vCPUs write, "
            "mostly to DIMMs and to other NUMA nodes than the first (docs/kernel-findings.md): "
            "see whether the pages differ under KVM too"
        ]

    async def _compare_range(self, common: CommonRange) -> None:
        whole = common.length // PAGE_BYTES * PAGE_BYTES
        offset = common.source.offset + common.gpa - common.source.gpa
        if whole < common.length:
            self.not_compared.append(
                NotCompared(
                    common.source.name, offset + whole, common.length - whole, "less than a page"
                )
            )
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
                area = ComparedArea(
                    gpa, common.source.name, offset + start, length // PAGE_BYTES, differing
                )
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


def _files(ram: GuestRam) -> set[tuple[int, int, int]]:
    return {(it.device, it.inode, it.offset) for it in ram.shared.values()}
