"""Pages that QEMU may skip because the guest says that they are free, told from lost pages."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dmaproof.evidence import HARVEST, Evidence, Slot
from dmaproof.journal import Journal, WriteKind
from qmp_tools.memory.ram import RamFile
from qmp_tools.migration.scenarios import find_scenario
from qmp_tools.proof.changes import GuestPages
from qmp_tools.proof.free_pages import without_free_pages
from qmp_tools.proof.sensitivity import sensitivity_by_guest
from qmp_tools.proof.verdict import GuestOutcome, Verdict
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 16
GPA = 1 << 32
FIRST = GPA // PAGE


def lost_pages(guest_pages: GuestPages, written: int) -> list[int]:
    """Return which of the pages 1 to 5 are lost, if a device wrote across the start of a page."""
    with ram_fd(PAGES * PAGE) as fd:
        status = os.fstat(fd)
        ram = RamFile(fd, status.st_size, status.st_dev, status.st_ino)
        slot = Slot(GPA, PAGES * PAGE, 0, ram.device, ram.inode)
        journal = Journal()
        journal.start()
        gpa = GPA + written * PAGE - 2
        journal.write(WriteKind.DATA, iova=gpa, gpa=gpa, data=b"data", epoch=1)
        none = np.empty(0, dtype=HARVEST)
        evidence = Evidence([slot], journal.records(), {}, none, None, 0)
        differing = np.arange(1, 6, dtype=np.int64)
        lost = without_free_pages(differing, ram, [slot], guest_pages, [evidence])
        return [int(page) for page in lost]


def test_only_pages_that_no_program_and_no_device_uses_may_be_skipped() -> None:
    assert lost_pages(GuestPages([range(FIRST + 2, FIRST + 6)]), written=4) == [1, 3, 4]


def test_a_page_that_the_guest_holds_unused_is_lost() -> None:
    declared = GuestPages([range(FIRST, FIRST + PAGES)], unused=[GPA + 2 * PAGE])
    assert lost_pages(declared, written=12) == [2]


def test_without_a_declaration_every_page_is_lost() -> None:
    assert lost_pages(GuestPages([]), written=12) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("syncs", "sent", "exercised"),
    [(1, 0, False), (2, 60_000, True), (2, 64_000, False), (3, 70_000, False)],
)
def test_hints_were_used_if_fewer_pages_were_sent_than_ram_has(
    syncs: int, sent: int, exercised: bool
) -> None:
    ram = {"dirty-sync-count": syncs, "total": 65_536 * PAGE, "page-size": PAGE}
    answer = {"status": "active", "ram": {**ram, "normal": sent - 5_000, "duplicate": 5_000}}
    scenario = find_scenario("free-page-hint")
    assert scenario.is_exercised_in(answer) is exercised
    assert not scenario.is_exercised_in({})


def test_the_verdict_says_what_was_not_compared() -> None:
    verdict = Verdict(
        PAGES,
        [],
        sensitivity_by_guest(10, guaranteed=True),
        GuestOutcome(1000, 0, 10),
        given_back=7,
        skips_free_pages=True,
    )
    assert verdict.sentence.startswith(
        "all pages are equal: 16 pages compared; 7 others differ, but"
    )
    assert "QEMU may skip pages that the guest says are free" in verdict.sentence
