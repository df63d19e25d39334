"""The side that the comparison queries and reads: refusals, continuing sources, rings, files.

Each side has two RAM files. The guest has the second file below the first, so an address never
equals its offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dmaproof.errors import UntestableError
from dmaproof.evidence import HARVEST, Evidence, Slot
from dmaproof.iova_bitmap import IovaRange
from dmaproof.journal import RECORD, WriteKind
from dmaproof.trace import TRACED_LINKS, PageEpochs
from qmp_tools.devices.vhost_recorder import KernelLog, KernelLogs
from qmp_tools.memory.ram import RamFile
from qmp_tools.migration.judgement import Blame
from qmp_tools.migration.log_watch import LogEvidence
from qmp_tools.migration.scenarios.precopy import Unix
from qmp_tools.proof import comparison
from qmp_tools.proof.attribution import slots_in
from qmp_tools.proof.comparison import Comparison, compare_guests
from qmp_tools.qemu.qmp import QmpRefusal
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 8
HIGH, LOW = 1 << 32, 2 * PAGES * PAGE
"""The GPAs of the first and the second file."""
HIDDEN = PAGE
"""The number of bytes at the start of the first file that are not in the guest."""
AVAILABLE, USED = HIGH, LOW + PAGES * PAGE - 4
"""The rings at the edges of their slots: the used index is the last two bytes of RAM."""
ALL_SENT_NS = 1000


class Qemu:
    """A QEMU that reports one split ring, whose device has answered GET_VRING_BASE with 10."""

    def __init__(self) -> None:
        self.qmp = self
        self.available_ring = AVAILABLE

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "x-query-virtio":
            return [{"name": "virtio-blk", "path": "/machine/disk"}]
        if arguments["queue"]:
            raise QmpRefusal("Invalid virtqueue number 1")
        return {
            "vring-desc": HIGH,
            "vring-avail": self.available_ring,
            "vring-used": USED,
            "vring-num": 128,
            "last-avail-idx": 10,
        }


class Guests:
    """Both sides of a migration, which a test changes before it compares them."""

    def __init__(self, sources: Sequence[RamFile], destinations: Sequence[RamFile]) -> None:
        self.sources, self.destinations = sources, destinations
        first, second = ((ram.device, ram.inode) for ram in sources)
        self.slots = [
            Slot(HIGH, PAGES * PAGE - HIDDEN, HIDDEN, *first),
            Slot(LOW, PAGES * PAGE, 0, *second),
        ]
        self.queried: list[object] = []
        self.evidence: list[Evidence] = []
        self.log: LogEvidence | None = None
        self.kernel_logs: KernelLogs | None = None
        self.scenario = Unix()
        self.pair = SimpleNamespace(
            source=Qemu(),
            destination=Qemu(),
            source_side="source",
            destination_side="destination",
            device=SimpleNamespace(evidence=self._evidence, kernel_logs=self._kernel_logs),
            hold_pages=range(0),
        )
        self.migrated = SimpleNamespace(
            refusal=None,
            source_continued=False,
            ram_is_comparable=True,
            ended_early=False,
            all_sent_ns=ALL_SENT_NS,
        )

    def _kernel_logs(self, side: str) -> KernelLogs | None:
        assert side == "source"
        return self.kernel_logs

    async def _evidence(self, side: str) -> list[Evidence]:
        assert side == "source"
        return self.evidence

    async def slots_of(self, qemu: object, ram: RamFile) -> list[Slot]:
        """Return the slots that QEMU reports for one file."""
        self.queried.append(qemu)
        return [slot for slot in self.slots if slot.inode == ram.inode]

    def write(self, rams: Sequence[RamFile], gpa: int, data: bytes) -> None:
        """Write only to the RAM of one side."""
        file, offset = (0, gpa - HIGH + HIDDEN) if gpa >= HIGH else (1, gpa - LOW)
        os.pwrite(rams[file].fd, data, offset)

    def set_ring(self, rams: Sequence[RamFile], *, used: int, available: int) -> None:
        """Set the indices of the ring in the RAM of one side."""
        self.write(rams, AVAILABLE + 2, struct.pack("<H", available))
        self.write(rams, USED + 2, struct.pack("<H", used))

    def journal(self, slots: Sequence[Slot], *gpas: int) -> Evidence:
        """Return the evidence of a device that wrote a byte to each address, seen by all links."""
        links = {
            link: PageEpochs([IovaRange(LOW, PAGES * PAGE), IovaRange(HIGH, PAGES * PAGE)])
            for link in TRACED_LINKS
        }
        rows = [(2000, 1, gpa, gpa, 1, 1, 0, WriteKind.DATA, 0) for gpa in gpas]
        for gpa in gpas:
            for link in TRACED_LINKS:
                links[link].see(gpa, 1, 1)
        records, harvests = np.array(rows, dtype=RECORD), np.empty(0, dtype=HARVEST)
        return Evidence([*slots], records, links, harvests, started_ns=500, requests=0)

    def compared(self, *, reports_rings: bool = False) -> Comparison:
        """Compare, as after a migration."""

        @contextlib.asynccontextmanager
        async def ram(files: Sequence[RamFile]) -> AsyncIterator[Sequence[RamFile]]:
            yield files

        log = self.log
        attempt = SimpleNamespace(
            source_ram=lambda: ram(self.sources),
            destination_ram=lambda: ram(self.destinations),
            log_watch=SimpleNamespace(evidence=lambda: log) if log else None,
            discarded_bits=frozenset(),
        )
        work = compare_guests(
            cast(Any, self.pair),
            self.scenario,
            cast(Any, attempt),
            cast(Any, self.migrated),
            reports_rings=reports_rings,
        )
        return asyncio.run(work)


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guests]:
    with contextlib.ExitStack() as stack:
        files = []
        for number in range(4):
            fd = stack.enter_context(ram_fd(PAGES * PAGE))
            status = os.fstat(fd)
            backend = f"ram{number % 2}"
            files.append(RamFile(fd, PAGES * PAGE, status.st_dev, status.st_ino, backend))
        made = Guests(files[:2], files[2:])
        monkeypatch.setattr(comparison, "slots_of", made.slots_of)
        yield made


def test_the_pages_of_all_files_are_compared(guests: Guests) -> None:
    for gpa in (HIGH + PAGE, LOW):
        guests.write(guests.sources, gpa, b"lost")
    found = guests.compared()
    assert [(page.gpa, page.bytes_differing) for page in found.lost] == [(HIGH + PAGE, 4), (LOW, 4)]
    assert found.pages == 2 * PAGES
    assert found.slots == guests.slots
    assert guests.queried == [guests.pair.destination] * 2
    assert found.wrong_rings == ()


def test_different_memory_backends_cannot_be_compared(guests: Guests) -> None:
    guests.destinations = [replace(guests.destinations[0], backend="other"), guests.destinations[1]]
    with pytest.raises(UntestableError, match="do not have the same memory backends"):
        guests.compared()


def test_the_scenario_sees_the_ram_of_both_sides(guests: Guests) -> None:
    seen = []

    class Watching(Unix):
        def require_arrival(
            self, source: Sequence[RamFile], destination: Sequence[RamFile]
        ) -> None:
            seen.append((source, destination))

    guests.scenario = Watching()
    guests.compared()
    assert seen == [(guests.sources, guests.destinations)]


def test_the_source_reports_the_slots_if_the_destination_refused_the_device(guests: Guests) -> None:
    guests.migrated.refusal = "no"
    assert guests.compared().pages == 2 * PAGES
    assert guests.queried == [guests.pair.source] * 2


def test_the_ram_of_a_source_that_continued_is_not_compared(guests: Guests) -> None:
    guests.migrated.source_continued, guests.migrated.ram_is_comparable = True, False
    guests.write(guests.sources, HIGH, b"later")
    found = guests.compared()
    assert (found.pages, found.lost, found.maps, found.paused) == (0, [], [], None)
    assert found.slots == guests.slots


def test_later_writes_to_the_paused_source_are_found(guests: Guests) -> None:
    found = guests.compared()
    assert found.paused is not None
    guests.write(guests.sources, LOW + PAGE, b"late")
    late = [
        page.gpa
        for ram in guests.sources
        for page in found.paused.written(ram, slots_in(ram, found.slots))
    ]
    assert late == [LOW + PAGE]


def test_partly_shared_ram_is_not_watched_for_late_writes(guests: Guests) -> None:
    guests.destinations = [guests.destinations[0], guests.sources[1]]
    assert guests.compared().paused is None


def test_a_journal_without_slots_gets_the_slots_that_qemu_reports(guests: Guests) -> None:
    guests.evidence = [guests.journal([], LOW), guests.journal([], HIGH)]
    found = guests.compared()
    assert [each.slots for each in found.evidence] == [guests.slots] * 2
    assert [each.records["gpa"].tolist() for each in found.evidence] == [[LOW], [HIGH]]


def test_a_journal_with_slots_keeps_them_and_qemu_is_not_queried(guests: Guests) -> None:
    guests.evidence = [guests.journal(guests.slots, LOW)]
    assert guests.compared().evidence is guests.evidence
    assert guests.queried == []


def test_a_scenario_without_a_journal_does_not_query_the_device(guests: Guests) -> None:
    class Unlogged(Unix):
        has_journal = False

    guests.scenario = Unlogged()
    guests.evidence = [guests.journal(guests.slots, LOW)]
    assert guests.compared().evidence == []


def test_the_map_shows_late_writes_and_lost_pages(guests: Guests) -> None:
    guests.evidence = [guests.journal(guests.slots, LOW, HIGH)]
    guests.evidence[0].records["time_ns"] = (ALL_SENT_NS, ALL_SENT_NS - 1)
    guests.write(guests.sources, LOW + PAGE, b"lost")
    first, second = guests.compared().maps
    names = list(first.meanings)
    assert [names[kind] for kind in first.areas[0].classes[:2]] == ["device", "other"]
    assert [names[kind] for kind in second.areas[0].classes[:3]] == ["late", "lost", "other"]
    assert [area.region for area in (first.areas[0], second.areas[0])] == ["ram0", "ram1"]


def test_the_journal_names_the_request_that_wrote_a_lost_page(guests: Guests) -> None:
    guests.evidence = [guests.journal(guests.slots, LOW)]
    guests.write(guests.sources, LOW, b"x")
    guests.write(guests.sources, HIGH, b"x")
    assert [(page.gpa, page.request) for page in guests.compared().lost] == [(HIGH, None), (LOW, 1)]


def test_an_early_bit_in_the_log_is_blamed(guests: Guests) -> None:
    guests.log = LogEvidence(looks=9, look_interval_s=0.001, early_bits=[LOW])
    for gpa in (HIGH, LOW):
        guests.write(guests.sources, gpa, b"lost")
    found = guests.compared()
    assert [page.blame for page in found.lost] == [Blame.UNKNOWN, Blame.EARLY_BIT]


def test_lost_pages_say_what_the_kernel_logged(guests: Guests) -> None:
    low_page = LOW // PAGE
    guests.kernel_logs = KernelLogs(np.array([low_page]), np.array([], dtype=np.int64))
    for gpa in (HIGH, LOW):
        guests.write(guests.sources, gpa, b"lost")
    found = guests.compared()
    assert found.kernel_logs == guests.kernel_logs
    assert [page.kernel_log for page in found.lost] == [KernelLog.NEVER, KernelLog.HANDED_ON]


@pytest.mark.parametrize(
    ("used", "available", "is_wrong"),
    [(8, 12, False), (11, 12, True), (8, 9, True), (0, 200, True)],
)
def test_the_ring_in_the_sources_ram_is_checked_against_the_answer(
    guests: Guests, used: int, available: int, is_wrong: bool
) -> None:
    guests.set_ring(guests.sources, used=used, available=available)
    found = guests.compared(reports_rings=True).wrong_rings
    assert [(ring.side, ring.used, ring.available) for ring in found] == (
        [("source", used, available)] if is_wrong else []
    )
    assert guests.compared().wrong_rings == (), "a QEMU that does not report rings is not queried"


@pytest.mark.parametrize(
    ("used", "available", "is_wrong"), [(0, 5, False), (50, 60, False), (0, 129, True)]
)
def test_only_the_consistency_of_the_destinations_ring_counts(
    guests: Guests, used: int, available: int, is_wrong: bool
) -> None:
    """The answer of the source's device belongs to the source's ring, which continued."""
    guests.migrated.source_continued, guests.migrated.ram_is_comparable = True, False
    guests.set_ring(guests.sources, used=8, available=12)
    guests.set_ring(guests.destinations, used=used, available=available)
    found = guests.compared(reports_rings=True).wrong_rings
    assert [(ring.side, ring.used, ring.available) for ring in found] == (
        [("destination", used, available)] if is_wrong else []
    )


def test_the_rings_of_a_destination_that_took_over_are_not_read(guests: Guests) -> None:
    guests.set_ring(guests.sources, used=8, available=12)
    guests.set_ring(guests.destinations, used=0, available=200)
    assert guests.compared(reports_rings=True).wrong_rings == []


@pytest.mark.parametrize("slot", [0, 1])
def test_a_ring_that_is_partly_outside_ram_is_not_judged(guests: Guests, slot: int) -> None:
    """The available index is at the start of slot 0, and the used index at the end of slot 1."""
    guests.set_ring(guests.sources, used=0, available=200)
    assert len(guests.compared(reports_rings=True).wrong_rings) == 1
    short = guests.slots[slot]
    first = 3 if slot == 0 else 0  # omits the lower byte of the available index
    guests.slots[slot] = short._replace(
        gpa=short.gpa + first,
        file_offset=short.file_offset + first,
        length=short.length - (first or 1),
    )
    assert guests.compared(reports_rings=True).wrong_rings == []


def test_an_index_at_the_start_of_a_slot_is_read(guests: Guests) -> None:
    """The ring begins in the previous slot."""
    first, second = guests.slots
    head = first._replace(length=PAGE)
    rest = first._replace(
        gpa=HIGH + PAGE, file_offset=first.file_offset + PAGE, length=first.length - PAGE
    )
    guests.slots = [head, rest, second]
    guests.pair.source.available_ring = rest.gpa - 2
    guests.write(guests.sources, rest.gpa, struct.pack("<H", 200))
    (ring,) = guests.compared(reports_rings=True).wrong_rings
    assert (ring.used, ring.available) == (0, 200)
