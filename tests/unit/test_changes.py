"""What a running destination has changed, told from what was lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from dmaproof.evidence import HARVEST, Evidence, Slot
from dmaproof.journal import Journal, WriteKind
from qmp_tools.memory.ram import RamFile, compare
from qmp_tools.proof.changes import Changes, GuestPages, RunningDestination
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 16
GPA = 1 << 32
FIRST = GPA // PAGE


@dataclass
class Sides:
    """The RAM of both sides, equal at first, and the journal of the destination's device."""

    source: RamFile
    destination: RamFile
    journal: Journal = field(default_factory=Journal)

    def device_writes(self, page: int, offset: int, data: bytes) -> None:
        os.pwrite(self.destination.fd, data, page * PAGE + offset)
        gpa = GPA + page * PAGE + offset
        self.journal.write(WriteKind.DATA, iova=gpa, gpa=gpa, data=data, epoch=1)

    def evidence(self) -> Evidence:
        slot = Slot(GPA, PAGES * PAGE, 0, self.source.device, self.source.inode)
        none = np.empty(0, dtype=HARVEST)
        return Evidence([slot], self.journal.records(), {}, none, None, 0)

    def explained(
        self, *guest_pages: range, unused: tuple[int, ...] = ()
    ) -> tuple[list[int], Changes]:
        running = RunningDestination([self.evidence()], GuestPages(guest_pages, unused))
        slots = self.evidence().slots
        differing = compare(self.source, self.destination)
        lost, changes = running.explain(differing, self.source, self.destination, slots)
        return lost.tolist(), changes


@pytest.fixture
def sides() -> Iterator[Sides]:
    with ram_fd(PAGES * PAGE) as source, ram_fd(PAGES * PAGE) as destination:
        sides = Sides(_opened(source), _opened(destination))
        sides.journal.start()
        yield sides


def _opened(fd: int) -> RamFile:
    status = os.fstat(fd)
    return RamFile(fd, status.st_size, status.st_dev, status.st_ino)


def test_bytes_that_the_destinations_device_wrote_are_not_lost(sides: Sides) -> None:
    sides.device_writes(3, 0, b"n" * PAGE)
    sides.device_writes(5, 100, b"new")
    assert sides.explained() == ([], Changes(by_devices=2))


def test_a_write_across_pages_explains_both(sides: Sides) -> None:
    sides.device_writes(3, PAGE - 2, b"four")
    assert sides.explained() == ([], Changes(by_devices=2))


@pytest.mark.parametrize("offset", [99, 103])
def test_a_byte_beside_the_devices_write_is_lost(sides: Sides, offset: int) -> None:
    sides.device_writes(5, 100, b"new")
    os.pwrite(sides.source.fd, b"x", 5 * PAGE + offset)
    assert sides.explained() == ([5], Changes())


def test_a_page_that_nobody_wrote_on_the_destination_is_lost(sides: Sides) -> None:
    sides.device_writes(5, 0, b"new")
    os.pwrite(sides.source.fd, b"lost", 6 * PAGE)
    assert sides.explained() == ([6], Changes(by_devices=1))


def test_pages_of_the_guest_are_not_compared(sides: Sides) -> None:
    for page in (2, 4, 9):
        os.pwrite(sides.destination.fd, b"guest", page * PAGE)
    assert sides.explained(range(FIRST + 4, FIRST + 6), range(FIRST + 1, FIRST + 3)) == (
        [9],
        Changes(by_guest=2, not_compared=4),
    )


def test_ranges_of_the_guest_may_overlap(sides: Sides) -> None:
    os.pwrite(sides.destination.fd, b"guest", 7 * PAGE)
    lost, changes = sides.explained(range(FIRST, FIRST + 8), range(FIRST + 1, FIRST + 2))
    assert (lost, changes.not_compared) == ([], 8)


def test_an_unused_page_among_those_of_the_guest_is_compared(sides: Sides) -> None:
    os.pwrite(sides.destination.fd, b"?", 3 * PAGE)
    lost, changes = sides.explained(range(FIRST, FIRST + 8), unused=(GPA + 3 * PAGE,))
    assert (lost, changes.not_compared) == ([3], 7)


def test_a_page_outside_the_guests_memory_belongs_to_nobody(sides: Sides) -> None:
    os.pwrite(sides.source.fd, b"?", 3 * PAGE)
    running = RunningDestination([sides.evidence()], GuestPages([range(1 << 50)]))
    lost, changes = running.explain(
        np.array([3], dtype=np.int64), sides.source, sides.destination, []
    )
    assert (lost.tolist(), changes) == ([3], Changes())


def test_changes_of_several_memory_backends_add_up() -> None:
    assert Changes(1, 2, 3) + Changes(10, 20, 30) == Changes(11, 22, 33)


def test_a_loss_on_a_page_that_was_written_on_the_destination_may_be_hidden(sides: Sides) -> None:
    sides.device_writes(1, 0, b"again")
    running = RunningDestination([sides.evidence()], GuestPages([range(FIRST + 3, FIRST + 4)]))
    written = np.array([FIRST, FIRST + 1, FIRST + 2, FIRST + 3], dtype=np.uint64)
    assert running.may_have_written(written).tolist() == [False, True, False, True]
