"""The place of a lost page and the write that counts, at the edges of slots and writes.

The RAM file begins with the guest's RAM above 4 GiB, so an address never equals its offset.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from dmaproof.evidence import HARVEST, Evidence, Slot
from dmaproof.iova_bitmap import IovaRange
from dmaproof.journal import RECORD, WriteKind
from dmaproof.trace import TRACED_LINKS, Link, PageEpochs
from qmp_tools.memory.ram import RamFile, compare
from qmp_tools.migration.judgement import Blame, EvidenceSource
from qmp_tools.proof.attribution import (
    LostPage,
    WrittenPages,
    attribute,
    blame_discarded_bits,
    gpa_of,
    slots_in,
)
from qmp_tools.proof.sensitivity import Sensitivity, measure_sensitivity, sensitivity_by_guest
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 8
LOW, HIGH = 2 * PAGE, 1 << 32
"""The GPAs of the second and the first half of the file, 4 pages each."""
HALF = 4 * PAGE
ALL_SENT_NS = 1000


class Proof:
    """The RAM of both sides, and the journal of a device that wrote on the source."""

    def __init__(self, stack: ExitStack) -> None:
        files = []
        for _ in range(2):
            fd = stack.enter_context(ram_fd(PAGES * PAGE))
            status = os.fstat(fd)
            files.append(RamFile(fd, PAGES * PAGE, status.st_dev, status.st_ino))
        self.source, self.destination = files
        identity = (self.source.device, self.source.inode)
        self.slots = [Slot(HIGH, HALF, 0, *identity), Slot(LOW, HALF, HALF, *identity)]
        self.rows: list[tuple[int, ...]] = []
        ranges = [IovaRange(LOW, HALF), IovaRange(HIGH, HALF)]
        self.links = {link: PageEpochs(ranges) for link in TRACED_LINKS}

    def write(
        self, gpa: int, data: bytes, *, iova: int = 0, time_ns: int = 2000, seen: bool = True
    ) -> None:
        """Let the device write on the source; all links or none see the write."""
        os.pwrite(self.source.fd, data, gpa - HIGH if gpa >= HIGH else gpa - LOW + HALF)
        number, kind = len(self.rows) + 1, WriteKind.DATA
        self.rows.append((time_ns, number, iova, gpa, 1, len(data), zlib.crc32(data), kind, 0))
        for link in TRACED_LINKS if seen else ():
            self.links[link].see(gpa, len(data), 1)

    def arrive(self, offset: int, data: bytes) -> None:
        """Write `data` to the destination at an offset of the file."""
        os.pwrite(self.destination.fd, data, offset)

    @property
    def evidence(self) -> Evidence:
        records = np.array(self.rows, dtype=RECORD)
        none = np.empty(0, dtype=HARVEST)
        return Evidence(self.slots, records, self.links, none, started_ns=500, requests=0)

    def lost(self) -> list[LostPage]:
        differing = compare(self.source, self.destination)
        return attribute(differing, self.source, self.destination, self.slots, [self.evidence])

    def sensitivity(self, slots: Sequence[Slot] | None = None) -> Sensitivity:
        evidence = self.evidence
        if slots is not None:
            evidence = Evidence(
                [*slots], evidence.records, self.links, evidence.harvests, 500, requests=0
            )
        return measure_sensitivity([evidence], ALL_SENT_NS)


@pytest.fixture
def proof() -> Iterator[Proof]:
    with ExitStack() as stack:
        yield Proof(stack)


@pytest.mark.parametrize(
    ("offset", "gpa"),
    [
        (0, HIGH),
        (HALF - 1, HIGH + HALF - 1),
        (HALF, LOW),
        (2 * HALF - 1, LOW + HALF - 1),
        (2 * HALF, None),
    ],
)
def test_an_offset_gets_its_gpa_from_the_slot_that_contains_it(
    proof: Proof, offset: int, gpa: int | None
) -> None:
    assert gpa_of(offset, proof.slots) == gpa
    assert gpa_of(offset, []) is None


def test_an_offset_before_every_slot_has_no_gpa(proof: Proof) -> None:
    assert gpa_of(HALF - 1, proof.slots[1:]) is None


def test_a_slot_belongs_to_the_file_with_its_device_and_inode(proof: Proof) -> None:
    slot = proof.slots[0]
    others = [slot._replace(device=slot.device + 1), slot._replace(inode=slot.inode + 1)]
    assert slots_in(proof.source, [*others, slot]) == [slot]


@pytest.mark.parametrize("gpa", [HIGH, HIGH + 3 * PAGE, HIGH + HALF - 4, LOW, LOW + HALF - 4])
def test_a_logged_write_that_the_source_still_has_is_qemus_loss(proof: Proof, gpa: int) -> None:
    proof.write(gpa, b"data", iova=gpa)
    (page,) = proof.lost()
    assert (page.blame, page.link) == (Blame.QEMU, Link.QEMU)
    assert page.gpa == gpa // PAGE * PAGE


def test_a_logged_write_that_was_partly_overwritten_later_is_the_accelerators_loss(
    proof: Proof,
) -> None:
    proof.write(HIGH + PAGE - 2, b"abcd", iova=7 * PAGE)
    os.pwrite(proof.source.fd, b"!", PAGE - 2)
    lost = proof.lost()
    assert [page.blame for page in lost] == [Blame.ACCELERATOR] * 2
    assert [page.iova for page in lost] == [7 * PAGE, 7 * PAGE + 2]


def test_a_write_that_begins_outside_ram_is_the_accelerators_loss(proof: Proof) -> None:
    proof.write(LOW, b"cd")
    proof.rows[0] = (2000, 1, 0, LOW - 2, 1, 4, zlib.crc32(b"abcd"), WriteKind.DATA, 0)
    (page,) = proof.lost()
    assert (page.blame, page.gpa, page.iova) == (Blame.ACCELERATOR, LOW, 2)


def test_the_last_write_to_a_differing_byte_counts(proof: Proof) -> None:
    proof.write(LOW + 8, b"first", iova=8, time_ns=2000, seen=False)
    proof.write(LOW + 13, b"second", iova=13, time_ns=3000, seen=False)
    proof.arrive(HALF + 13, b"second")
    (page,) = proof.lost()
    assert (page.request, page.iova, page.bytes_differing) == (1, 8, 5)
    assert page.seconds == pytest.approx(1.5e-6)
    proof.arrive(HALF + 8, b"first")
    proof.arrive(HALF + 18, b"?")
    (page,) = proof.lost()
    assert (page.request, page.bytes_differing) == (2, 1)


def test_a_byte_outside_every_write_is_lost_by_the_accelerator(proof: Proof) -> None:
    proof.write(LOW + PAGE - 2, b"abcd", seen=False)
    proof.arrive(HALF + PAGE - 2, b"abcd")
    proof.arrive(HALF + PAGE - 3, b"?")
    proof.arrive(HALF + PAGE + 2, b"?")
    lost = proof.lost()
    assert [(page.gpa, page.blame, page.request) for page in lost] == [
        (LOW, Blame.ACCELERATOR, None),
        (LOW + PAGE, Blame.ACCELERATOR, None),
    ]


def test_each_page_of_a_long_write_has_a_row() -> None:
    records = np.zeros(3, dtype=RECORD)
    records["gpa"] = (HIGH + PAGE, HIGH + 2 * PAGE - 1, HIGH + 3 * PAGE)
    records["length"] = (2 * PAGE, PAGE + 2, 1)
    written = WrittenPages(records)
    first = HIGH // PAGE
    rows = {page: written.rows_of(first + page).tolist() for page in range(5)}
    assert rows == {0: [], 1: [0, 1], 2: [0, 1], 3: [1, 2], 4: []}


def test_without_a_journal_only_the_write_once_pages_are_known() -> None:
    expected = Sensitivity(0, 0, 9, 9, 0, 0, 0, evidence_source=EvidenceSource.GUEST)
    assert sensitivity_by_guest(9) == expected
    assert sensitivity_by_guest(9, guaranteed=False).guaranteed_detectable == 0


def test_a_page_is_rewritten_if_its_write_is_not_before_all_pages_were_sent(proof: Proof) -> None:
    for page, time_ns in enumerate((ALL_SENT_NS - 1, ALL_SENT_NS, ALL_SENT_NS + 1)):
        proof.write(LOW + page * PAGE, b"x", time_ns=time_ns)
    sensitivity = proof.sensitivity()
    assert (sensitivity.written, sensitivity.rewritten, sensitivity.guaranteed_detectable) == (
        3,
        2,
        2,
    )


def test_reported_and_written_pages_are_matched_by_address(proof: Proof) -> None:
    proof.write(LOW + 3 * PAGE, b"x")
    proof.write(HIGH, b"x")
    proof.write(HIGH + 3 * PAGE, b"x")
    assert proof.sensitivity().reported_unwritten == 0
    for gpa in (LOW, HIGH + PAGE):
        proof.links[Link.LOG].see(gpa, PAGE, 1)
    assert proof.sensitivity().reported_unwritten == 2


def test_a_page_is_unreported_only_if_a_slot_still_contains_it(proof: Proof) -> None:
    for page in range(4):
        proof.write(HIGH + page * PAGE, b"x", seen=False)
    part = proof.slots[0]._replace(gpa=HIGH + PAGE, length=2 * PAGE)
    found = [proof.sensitivity(slots).unreported for slots in ([], [part], [part, *proof.slots])]
    assert found == [0, 2, 4]
    assert proof.sensitivity([part]).missed_by == {"": 2}


def test_a_write_to_the_first_byte_of_a_page_counts(proof: Proof) -> None:
    proof.write(LOW + PAGE, b"x", seen=False)
    assert [page.request for page in proof.lost()] == [1]


def test_a_write_of_zero_bytes_is_not_blamed(proof: Proof) -> None:
    proof.write(LOW, b"", seen=False)
    os.pwrite(proof.source.fd, b"vcpu", HALF)
    assert [(page.blame, page.request) for page in proof.lost()] == [(Blame.ACCELERATOR, None)]
    records = np.zeros(1, dtype=RECORD)
    records["gpa"] = 2 * PAGE - 1
    assert WrittenPages(records).pages.tolist() == [1]


def test_the_end_of_a_slot_is_the_start_of_the_next(proof: Proof) -> None:
    """The guest has the halves of the file at consecutive addresses, the second half first."""
    _, second = proof.slots
    proof.slots = [second, proof.slots[0]._replace(gpa=LOW + HALF)]
    proof.links = {link: PageEpochs([IovaRange(LOW, 2 * HALF)]) for link in TRACED_LINKS}
    os.pwrite(proof.source.fd, b"data", 0)
    gpa = LOW + HALF
    proof.rows = [(2000, 1, gpa, gpa, 1, 4, zlib.crc32(b"data"), WriteKind.DATA, 0)]
    for link in TRACED_LINKS:
        proof.links[link].see(gpa, 4, 1)
    assert [(page.gpa, page.blame) for page in proof.lost()] == [(gpa, Blame.QEMU)]


def test_a_page_outside_every_slot_is_lost_by_the_accelerator(proof: Proof) -> None:
    proof.write(LOW, b"data")
    proof.slots = proof.slots[:1]
    assert proof.lost() == [LostPage(HALF, None, 4, Blame.ACCELERATOR)]


def test_a_page_that_no_device_wrote_is_reported_without_a_write(proof: Proof) -> None:
    proof.write(HIGH, b"data")
    proof.arrive(0, b"data")
    os.pwrite(proof.source.fd, b"vcpu", HALF + PAGE)
    assert proof.lost() == [LostPage(HALF + PAGE, LOW + PAGE, 4, Blame.ACCELERATOR)]


def test_the_queue_the_kind_and_the_time_of_the_last_write_are_reported(proof: Proof) -> None:
    proof.write(LOW, b"data", seen=False)
    checksum = zlib.crc32(b"data")
    proof.rows = [(2_000_000_500, 1, 0, LOW, 1, 4, checksum, WriteKind.USED_RING, 3)]
    (page,) = proof.lost()
    assert (page.queue, page.kind, page.seconds) == (3, "used ring", 2.0)


def test_without_a_start_of_logging_the_time_is_the_clock_time(proof: Proof) -> None:
    proof.write(LOW, b"data", time_ns=2_000_000_000)
    evidence = replace(proof.evidence, started_ns=None)
    differing = compare(proof.source, proof.destination)
    (page,) = attribute(differing, proof.source, proof.destination, proof.slots, [evidence])
    assert page.seconds == 2.0


def test_of_two_devices_that_wrote_at_the_same_moment_the_first_counts(proof: Proof) -> None:
    proof.write(LOW, b"data", iova=7)
    first = replace(proof.evidence, device="first")
    proof.rows.clear()
    proof.write(LOW, b"data", iova=8)
    second = replace(proof.evidence, device="second")
    differing = compare(proof.source, proof.destination)
    for journals in ([first, second], [second, first]):
        (page,) = attribute(differing, proof.source, proof.destination, proof.slots, journals)
        assert page.device == journals[0].device


def test_the_rows_of_a_page_keep_the_order_of_the_writes_however_many_there_are() -> None:
    """An unstable sort may keep the order of a few equal items by chance."""
    records = np.zeros(3000, dtype=RECORD)
    records["gpa"] = np.arange(3000) % 3 * PAGE
    records["length"] = 1
    written = WrittenPages(records)
    for page in range(3):
        assert written.rows_of(page).tolist() == list(range(page, 3000, 3))


def test_json_without_a_journal_has_only_the_known_figures() -> None:
    members = sensitivity_by_guest(9).to_json()
    known = {name: value for name, value in members.items() if value is not None}
    assert known == {
        "rewritten": 9,
        "guaranteed_detectable": 9,
        "missed_at": {},
        "missed_by": {},
        "evidence_source": "guest",
    }


def test_qemu_lost_the_pages_whose_bits_it_left_in_a_discarded_log() -> None:
    pages = [LostPage(gpa, gpa, 9, Blame.UNKNOWN) for gpa in (PAGE, 2 * PAGE)]
    blamed = blame_discarded_bits(pages, {2 * PAGE, 3 * PAGE})
    assert [page.blame for page in blamed] == [Blame.UNKNOWN, Blame.QEMU]
