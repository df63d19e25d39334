"""Findings of a watch of the vhost log; the log and the RAM are memfds of the test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from dmaproof import _core
from dmaproof.evidence import Slot
from dmaproof.stamp import stamped_page
from qmp_tools.memory.ram import RamFile
from qmp_tools.migration.judgement import Blame
from qmp_tools.migration.log_watch import LogEvidence, LogWatch, UsedRing
from qmp_tools.proof.late_dma import PausedRam
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 64
FIRST = 16
"""The page of GPA at which the RAM begins."""
RING = UsedRing(queue=1, gpa=(FIRST + 5) * PAGE + 256)


class WatchedGuest:
    """A guest's RAM and log under watch, with the actions of a device and of QEMU."""

    def __init__(self, stack: ExitStack) -> None:
        self.ram = stack.enter_context(ram_fd(PAGES * PAGE))
        self.log = stack.enter_context(ram_fd(PAGE))
        status = os.fstat(self.ram)
        identity = (status.st_dev, status.st_ino)
        self.file = RamFile(self.ram, PAGES * PAGE, *identity)
        self.slots = [Slot(FIRST * PAGE, PAGES * PAGE, 0, *identity)]
        self.watch = LogWatch(self.log, [self.file], self.slots, [RING])

    def write(self, page: int, content: bytes = stamped_page(8, 1), offset: int = 0) -> None:
        os.pwrite(self.ram, content, page * PAGE + offset)

    def mark(self, page: int) -> None:
        place, bit = divmod(FIRST + page, 8)
        os.pwrite(self.log, bytes([os.pread(self.log, 1, place)[0] | 1 << bit]), place)

    def marked(self) -> list[int]:
        runs = np.frombuffer(_core.find_set(os.pread(self.log, PAGE, 0), 0, 8 * PAGE), np.uint64)
        return [
            int(page) - FIRST
            for start, length in runs.reshape(-1, 2)
            for page in range(int(start), int(start + length))
        ]

    def sync(self) -> None:
        """Take every bit, as QEMU does."""
        os.pwrite(self.log, bytes(PAGE), 0)

    def over(self) -> LogEvidence:
        self.watch.release()
        self.watch.end()
        return self.watch.evidence()


@pytest.fixture
def guest() -> Iterator[WatchedGuest]:
    with ExitStack() as stack:
        found = WatchedGuest(stack)
        stack.callback(found.watch.end)
        yield found


def eventually(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def report(guest: WatchedGuest, page: int) -> None:
    """Write the page, mark it, and let QEMU take the bit once it has been seen."""
    looks = guest.watch.reports
    guest.write(page)
    guest.mark(page)
    eventually(lambda: guest.watch.reports > looks)
    guest.sync()
    looks = guest.watch.looks
    eventually(lambda: guest.watch.looks > looks + 1)


def test_a_bit_set_after_its_data_stays_in_the_log(guest: WatchedGuest) -> None:
    guest.write(3)
    guest.mark(3)
    eventually(lambda: guest.watch.reports > 0)
    assert guest.marked() == [3]
    assert guest.over().early_bits == []


def test_a_bit_set_before_its_data_is_taken(guest: WatchedGuest) -> None:
    guest.mark(3)
    eventually(lambda: guest.marked() == [])
    guest.write(3)
    assert guest.over().early_bits == [(FIRST + 3) * PAGE]
    assert guest.marked() == []


def test_a_device_may_mark_a_page_before_and_after_it_writes(guest: WatchedGuest) -> None:
    guest.mark(3)
    eventually(lambda: guest.marked() == [])
    guest.write(3)
    guest.mark(3)
    guest.over()
    assert guest.marked() == [3]  # so QEMU sends it


def test_a_page_that_was_marked_and_never_written_gets_its_bit_back(guest: WatchedGuest) -> None:
    guest.mark(3)
    eventually(lambda: guest.marked() == [])
    guest.watch.release()
    assert guest.marked() == [3]
    guest.mark(4)  # and from now on nothing is taken
    assert guest.over().early_bits == []
    assert guest.marked() == [3, 4]


def test_a_bit_that_was_given_back_at_the_end_is_not_late(guest: WatchedGuest) -> None:
    guest.mark(3)
    eventually(lambda: guest.marked() == [])
    assert guest.over().late_bits == []
    assert guest.marked() == [3]


def test_bits_outside_of_ram_stay_in_the_log(guest: WatchedGuest) -> None:
    guest.mark(-FIRST)
    guest.mark(PAGES)
    eventually(lambda: guest.watch.reports > 0)
    assert guest.over().late_bits == []
    assert guest.marked() == [-FIRST, PAGES]


def test_bits_that_are_set_after_the_end_are_late(guest: WatchedGuest) -> None:
    report(guest, 3)
    guest.over()
    assert guest.watch.evidence().late_bits == []
    guest.mark(7)
    assert guest.watch.evidence().late_bits == [(FIRST + 7) * PAGE]


@pytest.mark.parametrize("logged", [True, False])
def test_a_used_ring_that_moves_must_be_logged(guest: WatchedGuest, logged: bool) -> None:
    for page in range(8, 20):
        guest.write(5, (10 * page).to_bytes(2, "little"), offset=256 + 2)
        if logged:
            guest.mark(5)
        report(guest, page)
    evidence = guest.over()
    assert evidence.judged_queues == [1]
    assert evidence.unlogged_queues == ([] if logged else [1])


def test_a_used_ring_is_judged_only_if_it_has_been_in_use(guest: WatchedGuest) -> None:
    guest.write(5, b"\x07", offset=256 + 2)
    for page in range(8, 20):
        report(guest, page)
    assert guest.over().judged_queues == []


def test_a_device_that_reports_only_at_the_end_is_not_judged_by_its_used_ring(
    guest: WatchedGuest,
) -> None:
    guest.write(5, b"\xff", offset=256 + 2)
    report(guest, 9)
    evidence = guest.over()
    assert evidence.judged_queues == []
    assert evidence.unlogged_queues == []


def test_late_dma_is_reported_by_page(guest: WatchedGuest) -> None:
    guest.write(2)
    paused = PausedRam([guest.file])
    assert paused.written(guest.file, guest.slots) == []
    guest.write(2, b"x", offset=1000)
    guest.write(9)
    (first, second) = paused.written(guest.file, guest.slots)
    assert [(page.ram_offset, page.gpa) for page in (first, second)] == [
        (2 * PAGE, (FIRST + 2) * PAGE),
        (9 * PAGE, (FIRST + 9) * PAGE),
    ]
    assert {first.blame, second.blame} == {Blame.LATE_DMA}
    assert paused.written(guest.file, [])[0].gpa is None
