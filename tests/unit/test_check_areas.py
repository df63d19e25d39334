"""The memory that a check of two QEMUs compares, locates differences in, and leaves out.

Both QEMUs are simulated: this process maps their RAM. Each test compares the QEMUs, a snapshot of
the source with the destination, and two snapshots.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmaproof.errors import UntestableError
from qmp_tools.memory.physical_map import MapRegion
from qmp_tools.ram_check.comparison import compare_guests
from qmp_tools.ram_check.guest import Guest, LiveGuest, live_guest
from qmp_tools.ram_check.outcome import Check, NotCompared
from qmp_tools.ram_check.snapshot import Snapshot, write_snapshot
from qmp_tools.ram_check.snapshot_file import create
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.simulated_qemu import SimulatedQemu

PAGES = 16
HIDDEN = range(5, 8)
"""The pages of the memory backend that the physical map hides."""
HIGH = 1 << 32
ROM = 0xFFF00000
ROM_PAGE = PAGES
"""The page of the file that contains the ROM, after the backend's pages."""
ROM_TAIL_BYTES = 512
REGIONS = [
    MapRegion(0, 5 * PAGE, "ram", "ram0"),
    MapRegion(ROM, PAGE + ROM_TAIL_BYTES, "rom", "rom"),
    MapRegion(HIGH, 8 * PAGE, "ram", "ram0", 8 * PAGE),
    MapRegion(HIGH << 1, PAGE, "ramd", "bar"),
]
BACKENDS = [{"id": "ram0", "size": PAGES * PAGE}]
RAM_BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000000040000 0x0000000000040000
"""


def simulated(
    stack: ExitStack, name: str, fd: int, flags: int = mmap.MAP_SHARED, **more: Any
) -> SimulatedQemu:
    """Return a QEMU whose RAM, in file `fd`, is mapped in this process."""
    mapping = mmap.mmap(fd, os.fstat(fd).st_size, flags)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offsets = {0: 0, HIGH: 8 * PAGE, ROM: ROM_PAGE * PAGE}
    stack.callback(lambda: mapping)  # keeps it mapped
    return SimulatedQemu(
        name=f"{name} QEMU",
        ram_fd=fd,
        regions=REGIONS,
        hvas={gpa: base + offset for gpa, offset in offsets.items()},
        pid=os.getpid(),
        backends=BACKENDS,
        **more,
    )


class Sides:
    """The source and the destination of a migration."""

    def __init__(self, stack: ExitStack, folder: Path, saved: Sequence[str]) -> None:
        self.folder = folder
        self._saved = saved
        self.stack = stack
        fds = [stack.enter_context(ram_fd((PAGES + 2) * PAGE)) for _ in range(2)]
        sent: dict[str, Any] = {"status": "completed", "ram": {}}
        self.source = simulated(stack, "source", fds[0], migration=sent)
        self.destination = simulated(stack, "destination", fds[1], state="paused")

    def lose(self, *pages: int) -> None:
        """Make these pages of the file differ."""
        for page in pages:
            os.pwrite(self.source.ram_fd, b"lost", page * PAGE)

    def check(self) -> Check:
        return asyncio.run(self._compare())

    async def _compare(self) -> Check:
        async with AsyncExitStack() as stack:
            guests: list[Guest] = []
            for name, qemu in (("source", self.source), ("destination", self.destination)):
                guest = await stack.enter_async_context(live_guest(qemu.attached, self.folder))
                guests.append(await self.snapshot(guest) if name in self._saved else guest)
            return await compare_guests(guests[0], guests[1])

    async def snapshot(self, guest: LiveGuest) -> Snapshot:
        path = self.folder / f"{guest.qemu.name}.snap"
        with create(path) as file:
            await write_snapshot(guest, await guest.state(), file)
        return Snapshot.read(path)


LIVE: tuple[str, ...] = ()
SAVED = ("source", "destination")
only_live = pytest.mark.parametrize("sides", [LIVE], indirect=True, ids=["live"])


@pytest.fixture(params=[LIVE, ("source",), SAVED], ids=["live", "saved source", "saved"])
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sides]:
    with ExitStack() as stack:
        yield Sides(stack, tmp_path, request.param)


def places(found: Check) -> list[tuple[int | None, str, int]]:
    """Return the places of the pages that differ, with offsets in pages."""
    return [
        (difference.gpa, difference.region, difference.offset // PAGE)
        for difference in found.differences
    ]


LOST = (4, 5, 7, 8, 15, ROM_PAGE)
PLACES = [
    (4 * PAGE, "ram0", 4),
    (ROM, "rom", 0),
    (HIGH, "ram0", 8),
    (HIGH + 7 * PAGE, "ram0", 15),
    (None, "ram0", 5),
    (None, "ram0", 7),
]


def test_mapped_and_hidden_memory_is_compared(sides: Sides) -> None:
    found = sides.check()
    areas = [(area.gpa, area.region, area.offset // PAGE, area.pages) for area in found.areas]
    assert areas == [
        (0, "ram0", 0, 5),
        (ROM, "rom", 0, 1),
        (HIGH, "ram0", 8, 8),
        (None, "ram0", 5, 3),
    ]
    assert found.sentence == f"all pages are equal: {PAGES + 1} pages compared"
    assert found.source.in_place_bytes == 14 * PAGE + ROM_TAIL_BYTES
    assert found.source.copied_bytes == found.source.saved_bytes == 0


def test_a_page_that_differs_is_located_by_address_and_backend_offset(sides: Sides) -> None:
    sides.lose(*LOST)
    found = sides.check()
    assert places(found) == PLACES
    assert (found.exit_code, found.differing) == (1, 6)


def test_pages_compared_in_pieces_have_the_same_addresses(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_tools.ram_check.comparison.PIECE_BYTES", 2 * PAGE)
    sides.source.pid = sides.destination.pid = 0  # then QEMU has to save its RAM
    sides.lose(4, 8, 15)
    found = sides.check()
    assert places(found) == [PLACES[0], *PLACES[2:4]]
    assert [
        (area.gpa, area.offset // PAGE, area.pages) for area in found.areas if area.region == "ram0"
    ] == [
        *((page * PAGE, page, min(2, 5 - page)) for page in (0, 2, 4)),
        *((HIGH + page * PAGE, 8 + page, 2) for page in (0, 2, 4, 6)),
    ]


def test_hidden_memory_is_compared_in_pieces_too(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_tools.ram_check.comparison.PIECE_BYTES", 2 * PAGE)
    sides.lose(*LOST)
    found = sides.check()
    assert places(found) == PLACES
    assert [(area.offset // PAGE, area.pages) for area in found.areas if area.gpa is None] == [
        (5, 2),
        (7, 1),
    ]


def mapped_ram(found: Check) -> list[tuple[int, int]]:
    """Return first page and length, in pages, of each compared area of the map's RAM."""
    return [
        (area.offset // PAGE, area.pages)
        for area in found.areas
        if area.gpa is not None and area.region == "ram0"
    ]


@only_live
def test_only_memory_that_both_sides_share_is_compared_in_one_piece(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_tools.ram_check.comparison.PIECE_BYTES", 4 * PAGE)
    assert mapped_ram(sides.check()) == [(0, 5), (8, 8)]
    private = simulated(sides.stack, "some", sides.source.ram_fd, mmap.MAP_PRIVATE)
    sides.source.hvas = private.hvas
    assert mapped_ram(sides.check()) == [(0, 4), (4, 1), (8, 4), (12, 4)]


def test_hidden_memory_is_compared_although_the_maps_have_different_edges(sides: Sides) -> None:
    low = sides.destination.hvas[0]
    sides.destination.hvas = {**sides.destination.hvas, 3 * PAGE: low + 3 * PAGE}
    sides.destination.regions = [
        MapRegion(0, 3 * PAGE, "ram", "ram0"),
        MapRegion(3 * PAGE, 2 * PAGE, "ram", "ram0", 3 * PAGE),
        *REGIONS[1:],
    ]
    sides.lose(6)
    assert places(sides.check()) == [(None, "ram0", 6)]


def test_hidden_memory_is_compared_although_another_backend_is_not_in_the_map(sides: Sides) -> None:
    sides.source.backends = [{"id": "unplugged", "size": PAGE}, *BACKENDS]
    sides.lose(6)
    assert places(sides.check()) == [(None, "ram0", 6)]


def test_private_memory_is_copied_including_its_hidden_part(sides: Sides) -> None:
    for qemu in (sides.source, sides.destination):
        private = simulated(sides.stack, "some", qemu.ram_fd, mmap.MAP_PRIVATE)
        qemu.hvas = private.hvas
    sides.lose(*LOST)
    found = sides.check()
    assert places(found) == PLACES
    for side in (found.source, found.destination):
        assert (side.in_place_bytes, side.copied_bytes) == (0, 14 * PAGE + ROM_TAIL_BYTES)
        assert (side.saved_bytes, side.pid) == (0, os.getpid())


def test_empty_arrays_of_page_numbers_have_an_integer_type(sides: Sides) -> None:
    kinds = {
        numbers.dtype
        for area in sides.check().areas
        for numbers in (area.differing, area.discarded, area.undecided)
    }
    assert kinds == {np.dtype(np.int64)}


def test_memory_that_is_not_compared_is_reported(sides: Sides) -> None:
    assert sides.check().not_compared == [
        NotCompared("rom", PAGE, ROM_TAIL_BYTES, "less than a page"),
        NotCompared("bar", 0, PAGE, "a device's own memory"),
    ]


@pytest.mark.parametrize("side", ["source", "destination"])
def test_hidden_memory_that_one_side_cannot_read_is_reported(sides: Sides, side: str) -> None:
    getattr(sides, side).pid = 0
    sides.lose(6)
    found = sides.check()
    assert (found.exit_code, found.pages) == (0, PAGES + 1 - len(HIDDEN))
    (hidden,) = (part for part in found.not_compared if part.region == "ram0")
    assert (hidden.offset, hidden.length) == (5 * PAGE, 3 * PAGE)
    assert hidden.why == "hidden by the physical map; QEMU can save only memory that the map shows"


@pytest.mark.parametrize("side", ["source", "destination"])
def test_hidden_memory_of_a_backend_that_only_one_side_shows_is_ignored(
    sides: Sides, side: str
) -> None:
    qemu: SimulatedQemu = getattr(sides, side)
    qemu.regions = [replace(region, name="other") for region in REGIONS]
    found = sides.check()
    assert all(area.gpa is not None for area in found.areas)
    assert "ram0" not in {part.region for part in found.not_compared}


def test_hidden_memory_of_backends_of_different_size_is_ignored(sides: Sides) -> None:
    sides.destination.backends = [{"id": "ram0", "size": 2 * PAGES * PAGE}]
    assert all(area.gpa is not None for area in sides.check().areas)


@only_live
def test_one_file_for_both_sides_proves_nothing(sides: Sides) -> None:
    sent = sides.source.migration
    twin = simulated(sides.stack, "source", sides.destination.ram_fd, migration=sent)
    sides.source = twin
    with pytest.raises(UntestableError, match="have their RAM in the same file"):
        sides.check()


def after_one_file(sides: Sides) -> Check:
    """Compare the source's snapshot with a destination that has the source's file, changed."""

    async def changed() -> Check:
        async with live_guest(sides.source.attached, sides.folder) as guest:
            before = await sides.snapshot(guest)
        sides.lose(4, 6)
        heir = simulated(sides.stack, "destination", sides.source.ram_fd, state="paused")
        async with live_guest(heir.attached, sides.folder) as guest:
            return await compare_guests(before, guest)

    return asyncio.run(changed())


@only_live
def test_a_snapshot_is_not_the_same_memory_although_it_was_taken_of_the_same_file(
    sides: Sides,
) -> None:
    """The file of the destination may have the number of the source's file, which was deleted."""
    found = after_one_file(sides)
    assert places(found) == [(4 * PAGE, "ram0", 4), (None, "ram0", 6)]
    assert "the same memory on both sides" not in {part.why for part in found.not_compared}


@only_live
def test_a_snapshot_is_compared_with_the_same_guest_later(sides: Sides) -> None:
    async def changed() -> Check:
        async with live_guest(sides.source.attached, sides.folder) as guest:
            before = await sides.snapshot(guest)
            sides.lose(4, 6)
            return await compare_guests(before, guest, expect_migration=False)

    assert places(asyncio.run(changed())) == [(4 * PAGE, "ram0", 4), (None, "ram0", 6)]


@only_live
def test_only_memory_shared_by_both_sides_is_not_compared(sides: Sides) -> None:
    shared = simulated(sides.stack, "source", sides.destination.ram_fd)
    own = sides.source.hvas
    sides.source.hvas = {**shared.hvas, HIGH: own[HIGH]}
    sides.lose(4, 6, 15)
    found = sides.check()
    assert places(found) == [(HIGH + 7 * PAGE, "ram0", 15)]
    left = [(part.region, part.offset, part.length) for part in found.not_compared]
    assert left == [
        ("ram0", 0, 5 * PAGE),
        ("rom", 0, PAGE + ROM_TAIL_BYTES),
        ("bar", 0, PAGE),
        ("ram0", 5 * PAGE, 3 * PAGE),
    ]
    assert [part.why for part in found.not_compared][::3] == ["the same memory on both sides"] * 2


@pytest.mark.parametrize(
    ("page", "dimm"), [(4, None), (11, None), (12, "dimm0"), (13, "dimm0"), (14, None), (6, None)]
)
def test_a_page_that_differs_names_its_dimm(sides: Sides, page: int, dimm: str | None) -> None:
    data = {"id": "dimm0", "addr": HIGH + 4 * PAGE, "size": 2 * PAGE}
    sides.source.memory_devices = [{"type": "dimm", "data": data}]
    sides.lose(page)
    assert [difference.device for difference in sides.check().differences] == [dimm]


TCG_MAY_LOSE = (
    "the source does not use KVM. With TCG this QEMU may lose what vCPUs write to RAM block ram0, "
    "because its size, 256 KiB, is a multiple of 256 KiB (qemu-findings.md in dmaproof's "
    "documentation). Check whether pages also differ under KVM"
)


@pytest.mark.parametrize(
    ("lost", "more", "noted"),
    [
        ((2, 6), {}, True),
        ((2,), {}, True),
        ((), {}, False),
        ((ROM_PAGE,), {}, False),
        ((2,), {"kvm": True}, False),
        ((2,), {"ram_blocks": "Error"}, False),
        ((2,), {"version": "11.2.0"}, False),
        ((2,), {"version": "10.0.2"}, False),
        ((2,), {"version": "10.0.2", "capabilities": ["postcopy-ram"]}, False),
    ],
)
def test_pages_that_tcg_may_have_lost_are_noted(
    sides: Sides, lost: tuple[int, ...], more: Mapping[str, Any], noted: bool
) -> None:
    sides.source.version, sides.source.ram_blocks = "7.2.22", RAM_BLOCKS
    for name, value in more.items():
        setattr(sides.source, name, value)
    sides.lose(*lost)
    notes = sides.check().notes
    assert notes == [TCG_MAY_LOSE] * noted


def test_a_note_says_that_tcg_may_lose_pages_with_postcopy(sides: Sides) -> None:
    sides.source.version, sides.source.ram_blocks = "11.1.3", RAM_BLOCKS
    sides.source.capabilities = ["postcopy-ram"]
    sides.lose(2)
    (note,) = sides.check().notes
    assert "RAM block ram0, because the capability postcopy-ram is on" in note


def balloon(**options: bool) -> dict[str, list[dict[str, str]]]:
    """Return what QEMU reports of a balloon with `options`."""
    folder = "/machine/peripheral"
    return {
        folder: [{"name": "b", "type": "child<virtio-balloon-device>"}],
        f"{folder}/b": [{"name": name.replace("_", "-"), "type": "bool"} for name in options],
    }


HINTED = (
    "the source has a balloon with free-page-hint=on: a page that was sent, and then freed and "
    "hinted by the guest, differs without being lost. Check whether pages also differ with "
    "free-page-hint=off"
)
UNDECIDED = (
    "dmaproof cannot determine from outside whether the undecided pages were lost or given back: a "
    "page may be zero because the kernel filled in a huge page around it, or a page of a host "
    "whose pages are larger than 4 KiB, or unsent because the guest hinted that it is free. For a "
    "decision, repeat the check on a host with pages of 4 KiB, with RAM in a memfd, without "
    "transparent huge pages, and with free-page-hint=off"
)


@pytest.mark.parametrize(
    ("qom", "received_page", "exit_code", "notes"),
    [
        ({}, 3, 1, []),
        (balloon(free_page_reporting=True), 3, 1, []),
        (balloon(free_page_hint=True), 3, 1, [HINTED]),
        (balloon(free_page_hint=True), None, 3, [UNDECIDED]),
        (balloon(free_page_reporting=True), None, 1, []),
    ],
)
def test_pages_that_a_balloon_may_have_changed_are_noted(
    sides: Sides,
    qom: dict[str, list[dict[str, str]]],
    received_page: int | None,
    exit_code: int,
    notes: list[str],
) -> None:
    """If no page of a block has reached the destination, a hint may have withheld the block."""
    sides.source.qom = sides.destination.qom = qom
    sides.lose(2)
    if received_page is not None:
        for qemu in (sides.source, sides.destination):
            os.pwrite(qemu.ram_fd, b"same", received_page * PAGE)
    found = sides.check()
    assert found.exit_code == exit_code
    assert found.notes == notes


def test_a_zero_page_is_undecided_if_its_memory_cannot_be_read(sides: Sides) -> None:
    """A balloon may have discarded the page, which QEMU does not report when it saves its RAM."""
    sides.source.qom = balloon(free_page_reporting=True)
    sides.source.qom["/machine/peripheral/b"].clear()
    sides.source.pid = sides.destination.pid = 0
    os.pwrite(sides.destination.ram_fd, b"sent", 2 * PAGE)
    found = sides.check()
    assert (found.exit_code, found.differing, found.undecided) == (3, 0, 1)
    assert found.discarders == ["balloon b"]


def test_a_clock_that_kvm_writes_is_named_and_does_not_count_as_lost(sides: Sides) -> None:
    clock = 0xE0
    with ram_fd((clock + 1) * PAGE) as sent, ram_fd((clock + 1) * PAGE) as received:
        for qemu, fd in ((sides.source, sent), (sides.destination, received)):
            qemu.hvas = simulated(sides.stack, "some", fd).hvas
            qemu.regions = [MapRegion(0, (clock + 1) * PAGE, "ram", "ram0")]
            qemu.backends, qemu.kvm = [], True
        os.pwrite(sent, b"time", clock * PAGE)
        assert sides.check().exit_code == 0
        os.pwrite(sent, b"lost", PAGE)
        found = sides.check()
    assert [
        (difference.offset // PAGE, difference.known, bool(difference.why))
        for difference in found.differences
    ] == [
        (1, None, False),
        (clock, "pvclock", True),
    ]
    assert (found.exit_code, found.differing, found.known) == (1, 2, 1)


def test_a_balloon_of_the_destination_does_not_count(sides: Sides) -> None:
    sides.destination.qom = balloon(free_page_hint=True)
    sides.lose(2)
    found = sides.check()
    assert (found.exit_code, list(found.discarders)) == (1, [])


def test_only_the_first_ten_thousand_pages_are_inspected(sides: Sides) -> None:
    low = 9_999
    with ram_fd((low + 3) * PAGE) as sent, ram_fd((low + 3) * PAGE) as received:
        regions = [
            MapRegion(0, low * PAGE, "ram", "ram0"),
            MapRegion(HIGH, 2 * PAGE, "ram", "ram0", low * PAGE),
            MapRegion(HIGH << 1, PAGE, "ram", "ram0", (low + 2) * PAGE),
        ]
        for qemu, fd in ((sides.source, sent), (sides.destination, received)):
            mapped = simulated(sides.stack, "some", fd)
            base = mapped.hvas[0]
            qemu.hvas = {region.gpa: base + region.offset for region in regions}
            qemu.regions, qemu.backends = regions, []
        for page in range(low + 3):
            os.pwrite(sent, b"lost", page * PAGE)
        found = sides.check()
    assert (found.differing, len(found.differences)) == (low + 3, 10_000)
    assert places(found)[-1] == (HIGH, "ram0", low)
