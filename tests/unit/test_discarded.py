"""Discarded and lost pages are distinguished, in memory of this process."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from qmp_tools.memory.absent_pages import absent_in_file, absent_in_process
from qmp_tools.memory.data_runs import DataRuns
from qmp_tools.memory.guest_ram import GuestRam
from qmp_tools.memory.pages import differing_pages
from qmp_tools.memory.physical_map import MapRegion
from qmp_tools.memory.process_memory import SharedMemory, mappings_of
from qmp_tools.qemu.qemu import Qemu
from qmp_tools.ram_check.discarded import (
    Discarder,
    Sorted,
    discarders,
    guest_drives_balloon,
    may_be_discarded,
    sort_differences,
)
from support.host_pages import HOST_PAGE as PAGE
from support.host_pages import IS_ALONE, PER_PAGE, of_each

PAGES = 64
BASE = 1 << 20
BALLOON = Discarder("balloon b")


def ram(data: dict[int, bytes], kind: str = "ram") -> GuestRam:
    """Return a guest's RAM in a memfd, in which only the pages of `data` are populated."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE)
    for page, content in data.items():
        os.pwrite(fd, content * PAGE, page * PAGE)
    region = MapRegion(BASE, PAGES * PAGE, kind, "ram0")
    status = os.fstat(fd)
    return GuestRam(
        qemu=cast(Qemu, None),
        regions=[region],
        hvas={},
        shared={region: SharedMemory(fd, 0, status.st_dev, status.st_ino)},
        process=None,
        backends={"ram0": PAGES * PAGE},
        dimms={},
        folder=Path(),
        boot_id="this boot",
    )


def sort(
    source: GuestRam, destination: GuestRam, *devices: Discarder, pages: int = PAGES
) -> list[list[int]]:
    """Return the pages of the host that differ, that were discarded, and that may be either."""
    region = source.regions[0]
    reaching = devices if may_be_discarded(source, region) else ()

    async def sorted_pages() -> Sorted:
        async with (
            source.pages(region, BASE, pages * PER_PAGE) as sent,
            destination.pages(destination.regions[0], BASE, pages * PER_PAGE) as received,
        ):
            return sort_differences(reaching, BASE, sent, received, differing_pages(sent, received))

    found = asyncio.run(sorted_pages())
    for side in (source, destination):
        os.close(next(iter(side.shared.values())).fd)
    return [_host_pages(numbers) for numbers in found]


def _host_pages(numbers: NDArray[np.int64]) -> list[int]:
    flags = np.zeros(PAGES * PER_PAGE, dtype=np.bool_)
    flags[numbers] = True
    return np.flatnonzero(of_each(flags)).tolist()


def test_an_absent_page_was_discarded_and_a_zeroed_one_is_lost() -> None:
    source = {3: b"a", 4: b"\0", 5: b"b", 7: b"n"}
    destination = {3: b"a", 4: b"o", 5: b"c", 6: b"o", 60: b"o"}
    # A page of zeros that shares a page of the host may have been discarded before the others.
    expected = [[4, 5, 7], [6, 60], []] if IS_ALONE else [[5, 7], [6, 60], [4]]
    assert sort(ram(source), ram(destination), BALLOON) == expected


def test_without_a_device_that_discards_every_difference_is_a_loss() -> None:
    assert sort(ram({}), ram({6: b"o"})) == [[6], [], []]


@pytest.mark.parametrize("kind", ["rom", "romd"])
def test_rom_is_never_discarded(kind: str) -> None:
    assert sort(ram({}, kind), ram({6: b"o"}, kind), BALLOON) == [[6], [], []]


def test_only_pages_of_a_memory_backend_can_be_given_back() -> None:
    assert sort(replace(ram({}), backends={}), ram({6: b"o"}), BALLOON) == [[6], [], []]


def test_a_device_discards_only_its_own_range() -> None:
    device = Discarder("virtio-mem v", BASE + 8 * PAGE, BASE + 16 * PAGE)
    destination = dict.fromkeys((7, 8, 15, 16), b"o")
    assert sort(ram({}), ram(destination), device) == [[7, 16], [8, 15], []]


def test_each_device_discards_its_own_range() -> None:
    device = Discarder("virtio-mem v", BASE + 8 * PAGE, BASE + 16 * PAGE)
    for devices in ((BALLOON, device), (device, BALLOON)):
        assert sort(ram({}), ram({6: b"o", 8: b"o"}), *devices) == [[], [6, 8], []]


def test_persistent_memory_can_be_given_back_too() -> None:
    assert sort(ram({}, "nv-ram"), ram({6: b"o"}, "nv-ram"), BALLOON) == [[], [6], []]


def test_a_second_device_does_not_decide_an_unsent_page_of_the_first() -> None:
    hinting = Discarder("balloon b (free-page-hint)", unsent_block_bytes=16 * PAGE)
    other = Discarder("virtio-mem v", BASE + 48 * PAGE, BASE + 64 * PAGE, 16 * PAGE)
    for devices in ((hinting, other), (other, hinting)):
        assert sort(ram({1: b"n"}), ram({}), *devices) == [[], [], [1]]


def test_pages_of_whole_unsent_blocks_are_undecided() -> None:
    hinting = Discarder("balloon b (free-page-hint)", unsent_block_bytes=16 * PAGE)
    source = dict.fromkeys((1, 17, 33), b"n")
    assert sort(ram(source), ram({18: b"\0"}), hinting) == [[17], [], [1, 33]]
    assert sort(ram(source), ram({18: b"\0"}), BALLOON) == [[1, 17, 33], [], []]


@pytest.mark.parametrize("pages", [1, 17])
def test_an_unsent_last_page_alone_in_its_block_is_undecided(pages: int) -> None:
    hinting = Discarder("balloon b (free-page-hint)", unsent_block_bytes=16 * PAGE)
    last = pages - 1
    assert sort(ram({last: b"n"}), ram({}), hinting, pages=pages) == [[], [], [last]]


@pytest.fixture
def private() -> Iterator[mmap.mmap]:
    """Map private memory without huge pages: page 0 is untouched, 1 read, 2 and 3 written."""
    memory = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    assert memory[PAGE] == 0
    memory[2 * PAGE] = 0
    memory[3 * PAGE] = 1
    yield memory
    memory.close()


def absent_pages_of(memory: mmap.mmap) -> tuple[list[bool], bool]:
    hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mappings = mappings_of(os.getpid(), "test")
    found = absent_in_process(os.getpid(), mappings, hva, 4 * PER_PAGE)
    return of_each(found.absent), found.certain


def test_private_memory_that_was_only_read_is_absent(private: mmap.mmap) -> None:
    assert absent_pages_of(private) == ([True, True, False, False], IS_ALONE)
    private.madvise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
    assert absent_pages_of(private) == ([True, True, True, False], IS_ALONE)


def test_memory_that_is_unmapped_or_shared_gives_no_certain_answer() -> None:
    unmapped = absent_in_process(os.getpid(), [], 1 << 40, 4)
    assert (unmapped.absent.tolist(), unmapped.certain) == ([False] * 4, False)
    with mmap.mmap(-1, 4 * PAGE) as shared:  # MAP_SHARED: it may be swapped out
        assert absent_pages_of(shared) == ([False] * 4, False)


def test_holes_of_a_file_are_absent() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8 * PAGE)
    for page in (0, 3, 5):
        os.pwrite(fd, b"\0" * PAGE, page * PAGE)
    found = absent_in_file(DataRuns(fd), 3 * PAGE, 4 * PER_PAGE)
    assert of_each(found.absent) == [False, True, False, True]
    assert absent_in_file(DataRuns(fd), 6 * PAGE, 2 * PER_PAGE).absent.all()
    os.close(fd)


UNUSED = """\
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram0

FlatView #1
 AS "virtio-balloon-pci", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""
USED = UNUSED.replace(
    ' AS "memory", root: system\n',
    ' AS "memory", root: system\n AS "virtio-balloon-pci", root: bus master container\n',
)


def test_a_balloon_is_in_use_when_the_guest_has_driven_it() -> None:
    assert not guest_drives_balloon(UNUSED.replace("\n", "\r\n"))
    assert guest_drives_balloon(USED)
    assert guest_drives_balloon(UNUSED.replace("virtio-balloon", "virtio-blk")), (
        "the balloon is not on a PCI bus"
    )


QOM = {
    "/machine/peripheral": [
        {"name": "b", "type": "child<virtio-balloon-ccw>"},
        {"name": "n", "type": "child<virtio-net-pci>"},
    ],
    "/machine/peripheral/b": [
        {"name": "virtio-backend", "type": "child<virtio-balloon-device>"},
        {"name": "free-page-reporting", "type": "bool"},
        {"name": "free-page-hint", "type": "bool"},
    ],
    "/machine/peripheral/n": [{"name": "mac", "type": "str"}],
    "/machine/peripheral-anon": [{"name": "device[0]", "type": "child<virtio-balloon-device>"}],
    "/machine/peripheral-anon/device[0]": [],
}


class Devices:
    """A QEMU with two balloons, one of them not on a PCI bus, and virtio-mem."""

    def __init__(
        self, flat_views: str, options: Sequence[str] = ("free-page-hint",), **virtio_mem: str
    ) -> None:
        self.qmp = self
        self._flat_views = flat_views
        self._options = options
        self._virtio_mem = virtio_mem

    async def monitor(self, command: str) -> str:
        assert command == "info mtree -f"
        return self._flat_views

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-memory-devices":
            sizes = {"memaddr": 1 << 32, "size": 0, "max-size": 1 << 30, "block-size": 1 << 21}
            data = {**sizes, **self._virtio_mem}
            return [{"type": "dimm", "data": {}}, {"type": "virtio-mem", "data": data}]
        if command == "qom-get":
            assert arguments["path"] == "/machine/peripheral/b"
            return arguments["property"] in self._options
        return [{"name": "type", "type": "string"}, *QOM[arguments["path"]]]


def test_devices_are_found_with_and_without_an_id() -> None:
    found = asyncio.run(discarders(cast(Qemu, Devices(USED))))
    virtio_mem = Discarder("virtio-mem without an id", 1 << 32, 5 << 30, 1 << 21)
    assert found == [
        Discarder("balloon b (free-page-hint)", unsent_block_bytes=4 << 20, hints=True),
        Discarder("balloon device[0]"),
        virtio_mem,
    ]
    assert asyncio.run(discarders(cast(Qemu, Devices(UNUSED)))) == [virtio_mem]


def test_devices_are_named_by_id_and_options() -> None:
    options = ("free-page-hint", "free-page-reporting")
    found = asyncio.run(discarders(cast(Qemu, Devices(USED, options, id="vm0"))))
    assert [device.name for device in found] == [
        "balloon b (free-page-reporting, free-page-hint)",
        "balloon device[0]",
        "virtio-mem vm0",
    ]
