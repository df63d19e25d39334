"""What a watch of the vhost log takes, judges and ignores at its limits.

The guest's RAM is at the end of what the log covers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import pytest

from dmaproof import _core
from dmaproof.evidence import Slot
from dmaproof.stamp import stamped_page
from qmp_tools.memory.ram import RamFile
from qmp_tools.migration.log_watch import LogWatch, UsedRing, used_rings
from qmp_tools.qemu.qmp import QmpRefusal
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.host_pages import host_pages

PAGES = 4200
LOG_BITS = 8 * PAGE
FIRST = LOG_BITS - PAGES
"""The page of GPA at which the RAM begins."""
RING_PAGE = 70
RING = UsedRing(queue=1, gpa=(FIRST + RING_PAGE) * PAGE + 256)


class Guest:
    """A guest's RAM and its log; `pages` are counted from the start of the RAM."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.ram = stack.enter_context(ram_fd(PAGES * PAGE))
        self.log = stack.enter_context(ram_fd(PAGE))
        status = os.fstat(self.ram)
        self.file = RamFile(self.ram, PAGES * PAGE, status.st_dev, status.st_ino)
        self.slot = Slot(FIRST * PAGE, PAGES * PAGE, 0, status.st_dev, status.st_ino)

    def watch(self, *more: Slot) -> LogWatch:
        """Watch the log from now on."""
        watch = LogWatch(self.log, [self.file], [*more, self.slot], [RING])
        self._stack.callback(watch.end)
        return watch

    def write(self, page: int, content: bytes = stamped_page(8, 1), offset: int = 0) -> None:
        os.pwrite(self.ram, content, page * PAGE + offset)

    def used_index(self, index: int) -> None:
        """Let the used ring have `index`, behind its flags."""
        self.write(RING_PAGE, index.to_bytes(2, "little"), offset=256 + 2)

    def mark(self, pages: Iterable[int], *, is_set: bool = True) -> None:
        bits = np.unpackbits(
            np.frombuffer(os.pread(self.log, PAGE, 0), np.uint8), bitorder="little"
        )
        bits[[FIRST + page for page in pages]] = is_set
        os.pwrite(self.log, np.packbits(bits, bitorder="little").tobytes(), 0)

    def marked(self) -> list[int]:
        bits = np.unpackbits(
            np.frombuffer(os.pread(self.log, PAGE, 0), np.uint8), bitorder="little"
        )
        return [int(page) - FIRST for page in np.flatnonzero(bits)]

    def sync(self) -> None:
        """Take every bit, as QEMU does."""
        os.pwrite(self.log, bytes(PAGE), 0)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with ExitStack() as stack:
        yield Guest(stack)


def eventually(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_two_passes(watch: LogWatch) -> None:
    """Wait until the watch has begun and finished a pass over the log."""
    looks = watch.looks
    eventually(lambda: watch.looks > looks + 1)


def early(watch: LogWatch) -> list[int]:
    """Return the pages whose bits were early."""
    return [gpa // PAGE - FIRST for gpa in watch.evidence().early_bits]


@pytest.mark.parametrize(("bits", "taken"), [(4096, 64), (4097, 0)])
def test_no_bit_is_taken_if_more_than_4096_are_new(guest: Guest, bits: int, taken: int) -> None:
    guest.mark(range(bits))
    watch = guest.watch()
    wait_for_two_passes(watch)
    assert early(watch) == [*range(taken)]
    assert guest.marked() == [*range(taken, bits)]


def test_no_more_than_64_bits_are_taken_in_all(guest: Guest) -> None:
    guest.mark(range(40))
    watch = guest.watch()
    wait_for_two_passes(watch)
    guest.mark(range(100, 140))
    wait_for_two_passes(watch)
    assert early(watch) == [*range(40), *range(100, 124)]
    assert guest.marked() == [*range(124, 140)]


def test_ram_may_begin_inside_a_page_of_the_host(guest: Guest) -> None:
    """A slot of the guest's RAM begins at any page of its file."""
    skipped = 3
    guest.slot = guest.slot._replace(
        gpa=guest.slot.gpa + skipped * PAGE,
        length=guest.slot.length - skipped * PAGE,
        file_offset=skipped * PAGE,
    )
    guest.write(skipped + 5)
    with host_pages(16 * PAGE):
        watch = guest.watch()
    guest.mark([skipped + 5, skipped + 6])
    wait_for_two_passes(watch)
    assert early(watch) == [skipped + 6]


def test_the_first_and_the_last_page_of_ram_are_watched(guest: Guest) -> None:
    guest.mark([-1, 0, PAGES - 1])
    watch = guest.watch()
    wait_for_two_passes(watch)
    assert early(watch) == [0, PAGES - 1]
    assert guest.marked() == [-1]


def test_a_page_after_the_ram_does_not_end_the_watch(guest: Guest) -> None:
    guest.slot = guest.slot._replace(length=guest.slot.length - PAGE)
    guest.mark([PAGES - 1])
    watch = guest.watch()
    wait_for_two_passes(watch)
    guest.mark([3])
    wait_for_two_passes(watch)
    assert early(watch) == [3]


def test_remaining_bits_are_late_up_to_the_edges_of_ram(guest: Guest) -> None:
    watch = guest.watch()
    watch.release()
    watch.end()
    guest.mark([-1, 0, 77, PAGES - 1])
    late = [gpa // PAGE - FIRST for gpa in watch.evidence().late_bits]
    assert late == [0, 77, PAGES - 1]


def test_a_page_with_data_after_its_first_word_keeps_its_bit(guest: Guest) -> None:
    guest.write(3, b"data", offset=PAGE - 8)
    guest.mark([3])
    watch = guest.watch()
    wait_for_two_passes(watch)
    assert (early(watch), guest.marked()) == ([], [3])


def test_a_slot_of_another_file_is_ignored(guest: Guest) -> None:
    other = guest.slot._replace(gpa=0, inode=guest.slot.inode + 1)
    guest.mark([-FIRST])
    watch = guest.watch(other)
    wait_for_two_passes(watch)
    watch.end()
    assert (early(watch), watch.evidence().late_bits) == ([], [])


def test_a_bit_whose_data_arrives_while_it_is_taken_is_given_back(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_set = _core.take_set

    def write_and_take(log: Any, first: int, count: int) -> bytes:
        guest.write(first - FIRST)
        return take_set(log, first, count)

    monkeypatch.setattr("dmaproof._core.take_set", write_and_take)
    guest.mark([3])
    watch = guest.watch()
    wait_for_two_passes(watch)
    assert guest.marked() == [3]  # so QEMU sends it
    watch.end()
    assert (early(watch), watch.evidence().late_bits) == ([], [])


def test_a_bit_that_qemu_takes_first_is_not_early(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_set = _core.take_set

    def sync_and_take(log: Any, first: int, count: int) -> bytes:
        guest.sync()
        return take_set(log, first, count)

    monkeypatch.setattr("dmaproof._core.take_set", sync_and_take)
    guest.mark([3])
    watch = guest.watch()
    wait_for_two_passes(watch)
    guest.write(3)
    assert (early(watch), guest.marked()) == ([], [])


def test_nothing_is_taken_after_the_log_is_released(guest: Guest) -> None:
    watch = guest.watch()
    watch.release()
    guest.mark([3])
    wait_for_two_passes(watch)
    guest.write(3)
    assert (early(watch), guest.marked()) == ([], [3])


def test_a_bit_that_stays_set_counts_as_one_report(guest: Guest) -> None:
    watch = guest.watch()
    wait_for_two_passes(watch)
    assert watch.reports == 0
    guest.write(3)
    guest.mark([3])
    wait_for_two_passes(watch)
    wait_for_two_passes(watch)
    assert watch.reports == 1


@pytest.mark.parametrize(
    ("reports", "first_index", "last_index", "judged"),
    [
        (8, 0, 64, [1]),
        (7, 0, 64, []),
        (8, 0, 63, []),
        (8, 1000, 1064, [1]),
        (8, 1000, 1063, []),
        (8, 0xFFF0, 0x30, [1]),
        (8, 0xFFF0, 0x2F, []),
    ],
)
def test_a_used_ring_is_judged_after_8_reports_and_64_requests(
    guest: Guest, reports: int, first_index: int, last_index: int, judged: list[int]
) -> None:
    guest.used_index(first_index)
    watch = guest.watch()
    for page in range(reports):
        guest.write(page)
        guest.mark([page])
        wait_for_two_passes(watch)
        guest.sync()
        wait_for_two_passes(watch)
    guest.used_index(last_index)
    evidence = watch.evidence()
    assert watch.reports == reports
    assert evidence.judged_queues == evidence.unlogged_queues == judged


@pytest.mark.parametrize(
    ("page", "unlogged"), [(RING_PAGE, []), (RING_PAGE - 1, [1]), (RING_PAGE + 1, [1])]
)
def test_only_the_bit_of_its_own_page_logs_a_used_ring(
    guest: Guest, page: int, unlogged: list[int]
) -> None:
    watch = guest.watch()
    for other in range(8):
        guest.write(other)
        guest.mark([other])
        wait_for_two_passes(watch)
        guest.sync()
        wait_for_two_passes(watch)
    guest.used_index(64)
    guest.write(page, b"x", offset=PAGE - 1)
    guest.mark([page])
    wait_for_two_passes(watch)
    assert watch.evidence().unlogged_queues == unlogged


def test_the_log_is_read_at_most_every_100_microseconds(guest: Guest) -> None:
    began_s = time.monotonic()
    watch = guest.watch()
    time.sleep(0.1)
    watch.end()
    assert 0 < watch.looks <= (time.monotonic() - began_s) / 100e-6
    assert 100e-6 <= watch.evidence().look_interval_s < time.monotonic() - began_s


class VhostQemu:
    """A QEMU with a device that is not a vhost device, and one, called `name`, with two queues."""

    def __init__(self, name: str, *version: int) -> None:
        self._name = name
        self._version = dict(zip(("major", "minor", "micro"), version, strict=True))

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-version":
            return {"qemu": self._version, "package": ""}
        if command == "x-query-virtio":
            return [
                {"path": "/balloon", "name": "virtio-balloon"},
                {"path": "/disk", "name": self._name},
            ]
        assert command == "x-query-virtio-vhost-queue-status"
        if arguments["path"] != "/disk" or arguments["queue"] == 2:
            raise QmpRefusal("Invalid vhost device")
        return {"used-phys": 0x1000 + arguments["queue"] * PAGE}


class OldQemu:
    """A QEMU before 7.2."""

    async def execute(self, command: str, **arguments: Any) -> Any:
        raise QmpRefusal(f"The command {command} has not been found")


@pytest.mark.parametrize(
    ("name", "version", "asked"),
    [
        ("virtio-blk", (7, 2, 22), True),
        ("virtio-scsi", (7, 2, 22), False),
        ("virtio-scsi", (8, 1, 5), False),
        ("virtio-scsi", (8, 2, 0), True),
        ("virtio-scsi", (10, 0, 13), True),
    ],
)
def test_the_used_rings_are_found_unless_qemu_would_crash(
    name: str, version: tuple[int, ...], asked: bool
) -> None:
    found = asyncio.run(used_rings(cast(Any, VhostQemu(name, *version))))
    assert found == ([UsedRing(0, 0x1000), UsedRing(1, 0x2000)] if asked else [])


def test_a_qemu_that_does_not_report_its_rings_has_none() -> None:
    assert asyncio.run(used_rings(cast(Any, OldQemu()))) == []
