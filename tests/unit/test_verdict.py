"""Attribution of losses: every kind of loss, made by hand in two RAM files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest

from dmaproof.evidence import HARVEST, Evidence, Slot
from dmaproof.iova_bitmap import IovaRange
from dmaproof.journal import RECORD, WriteKind
from dmaproof.trace import TRACED_LINKS, Link, PageEpochs
from qmp_tools.memory.ram import RamFile, compare
from qmp_tools.migration.downtime import Downtime, Part
from qmp_tools.migration.judgement import Blame, EvidenceSource
from qmp_tools.migration.log_watch import LogEvidence
from qmp_tools.proof.attribution import (
    LostPage,
    WrittenPages,
    attribute,
    blame_early_bits,
    with_late_dma,
)
from qmp_tools.proof.sensitivity import Sensitivity, measure_sensitivity, sensitivity_by_guest
from qmp_tools.proof.verdict import GuestOutcome, Verdict
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 64
HIGH = 1 << 32
"""The second half of the file is guest RAM above 4 GiB."""
ALL_SENT_NS = 1000


@dataclass
class Case:
    """Two RAM files, and a journal of the device's writes."""

    source: RamFile
    destination: RamFile

    def __post_init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        ranges = [IovaRange(0, PAGES // 2 * PAGE), IovaRange(HIGH, PAGES // 2 * PAGE)]
        self.links = {link: PageEpochs(ranges) for link in TRACED_LINKS}

    def device_writes(
        self,
        gpa: int,
        data: bytes,
        *,
        epoch: int = 1,
        time_ns: int = 2000,
        seen_by: tuple[Link, ...] = TRACED_LINKS,
        kind: WriteKind = WriteKind.DATA,
    ) -> None:
        """Let the device write on the source; the links `seen_by` see the write in its epoch."""
        offset = gpa if gpa < HIGH else gpa - HIGH + PAGES // 2 * PAGE
        os.pwrite(self.source.fd, data, offset)
        self.rows.append(
            (time_ns, len(self.rows) + 1, gpa, gpa, epoch, len(data), zlib.crc32(data), kind, 0)
        )
        for link in seen_by:
            self.links[link].see(gpa, len(data), epoch)

    def evidence(self) -> Evidence:
        half = PAGES // 2 * PAGE
        identity = (self.source.device, self.source.inode)
        return Evidence(
            slots=[Slot(0, half, 0, *identity), Slot(HIGH, half, half, *identity)],
            records=np.array(self.rows, dtype=RECORD),
            links=self.links,
            harvests=np.empty(0, dtype=HARVEST),
            started_ns=500,
            requests=0,
        )

    def lost(self) -> list[LostPage]:
        differing = compare(self.source, self.destination)
        evidence = self.evidence()
        return attribute(differing, self.source, self.destination, evidence.slots, [evidence])

    def sensitivity(self) -> Sensitivity:
        return measure_sensitivity([self.evidence()], ALL_SENT_NS)


@pytest.fixture
def case() -> Iterator[Case]:
    with ExitStack() as stack:
        files = []
        for _ in range(2):
            fd = stack.enter_context(ram_fd(PAGES * PAGE))
            status = os.fstat(fd)
            files.append(RamFile(fd, PAGES * PAGE, status.st_dev, status.st_ino))
        yield Case(*files)


def test_a_loss_is_attributed_to_the_one_of_two_devices_that_wrote_the_page(case: Case) -> None:
    def evidence_of(device: Case, name: str) -> Evidence:
        return replace(device.evidence(), device=name)

    disk, net = case, Case(case.source, case.destination)
    disk.device_writes(3 * PAGE, b"d" * PAGE)
    disk.device_writes(4 * PAGE, b"d" * 64, time_ns=2000)
    net.device_writes(4 * PAGE, b"n" * 64, time_ns=3000, seen_by=())
    net.device_writes(5 * PAGE, b"n" * PAGE, time_ns=3000, seen_by=(Link.TRACKER,))
    os.pwrite(case.destination.fd, b"d" * PAGE, 3 * PAGE)
    evidence = [evidence_of(disk, "blk"), evidence_of(net, "net")]
    differing = compare(case.source, case.destination)
    lost = attribute(differing, case.source, case.destination, evidence[0].slots, evidence)
    assert [(page.gpa, page.device, page.link) for page in lost] == [
        (4 * PAGE, "net", Link.TRACKER),
        (5 * PAGE, "net", Link.ITERATOR),
    ]
    sensitivity = measure_sensitivity(evidence, ALL_SENT_NS)
    assert (sensitivity.written, sensitivity.guaranteed_detectable, sensitivity.unreported) == (
        3,
        2,
        2,
    )
    assert sensitivity.missed_at == {"tracker": 1, "iterator": 1}
    assert sensitivity.missed_by == {"net": 2}
    assert sensitivity.reported_unwritten == 0


@pytest.mark.parametrize("link", TRACED_LINKS)
def test_the_link_that_missed_a_page_is_named(case: Case, link: Link) -> None:
    seen = TRACED_LINKS[: TRACED_LINKS.index(link)]
    case.device_writes(HIGH + 5 * PAGE, b"x" * PAGE, epoch=3, seen_by=seen)
    (page,) = case.lost()
    assert (page.blame, page.link) == (Blame.DEVICE, link)
    assert page.gpa == page.iova == HIGH + 5 * PAGE
    assert page.ram_offset == (PAGES // 2 + 5) * PAGE
    assert (page.request, page.kind, page.due_in_harvest) == (1, "data", 3)
    assert page.seconds == pytest.approx(1.5e-6)


def test_a_page_that_was_logged_before_its_last_write_is_lost_by_the_device(case: Case) -> None:
    case.device_writes(0, b"one", epoch=1)
    case.device_writes(0, b"two", epoch=2, seen_by=(Link.TRACKER,))
    (page,) = case.lost()
    assert (page.blame, page.link, page.request) == (Blame.DEVICE, Link.ITERATOR, 2)
    assert page.last_seen_in_harvest == {
        "tracker": 2,
        "iterator": 1,
        "translation": 1,
        "log": 1,
    }


def test_a_page_that_was_in_the_log_is_lost_by_qemu(case: Case) -> None:
    case.device_writes(PAGE, b"data")
    (page,) = case.lost()
    assert (page.blame, page.link) == (Blame.QEMU, Link.QEMU)


def test_a_page_that_a_vcpu_wrote_later_is_lost_by_the_accelerator(case: Case) -> None:
    case.device_writes(PAGE, b"data")
    os.pwrite(case.source.fd, b"vcpu", PAGE)
    (page,) = case.lost()
    assert (page.blame, page.link, page.request) == (Blame.ACCELERATOR, None, 1)


def test_bytes_that_no_device_wrote_are_lost_by_the_accelerator(case: Case) -> None:
    case.device_writes(PAGE, b"data")
    os.pwrite(case.destination.fd, b"data", PAGE)
    os.pwrite(case.source.fd, b"vcpu", PAGE + 100)  # beside the device's bytes
    os.pwrite(case.source.fd, b"vcpu", 2 * PAGE)
    assert [(page.blame, page.request, page.bytes_differing) for page in case.lost()] == [
        (Blame.ACCELERATOR, None, 4)
    ] * 2


def test_a_write_across_pages_loses_just_the_page_that_differs(case: Case) -> None:
    case.device_writes(3 * PAGE - 2, b"abcd", seen_by=())
    os.pwrite(case.destination.fd, b"ab", 3 * PAGE - 2)
    (page,) = case.lost()
    assert (page.gpa, page.iova, page.bytes_differing) == (3 * PAGE, 3 * PAGE, 2)


def test_an_unlogged_page_fails_the_proof_even_if_it_is_equal(case: Case) -> None:
    case.device_writes(0, b"a", seen_by=())
    case.device_writes(PAGE, b"b", seen_by=TRACED_LINKS[:2])
    case.device_writes(HIGH, b"c", epoch=1)
    case.device_writes(HIGH, b"d", epoch=2, kind=WriteKind.STATUS, seen_by=TRACED_LINKS[:3])
    case.device_writes(2 * PAGE, b"e")
    for offset, content in ((0, b"a"), (PAGE, b"b"), (PAGES // 2 * PAGE, b"d"), (2 * PAGE, b"e")):
        os.pwrite(case.destination.fd, content, offset)
    sensitivity = case.sensitivity()
    assert (sensitivity.unreported, sensitivity.unreported_guaranteed) == (3, 2)
    assert sensitivity.missed_at == {"tracker": 1, "translation": 1, "log": 1}
    verdict = Verdict(PAGES, case.lost(), sensitivity, GuestOutcome(1000, 0, 10))
    assert verdict.lost == []
    assert verdict.exit_code == 1
    assert "but 3 pages that the device wrote were never reported dirty" in verdict.sentence


def test_memory_that_was_unplugged_need_not_be_logged(case: Case) -> None:
    case.device_writes(0, b"a", seen_by=())
    case.device_writes(HIGH, b"b", seen_by=())
    evidence = replace(case.evidence(), slots=case.evidence().slots[:1])
    assert measure_sensitivity([evidence], ALL_SENT_NS).unreported == 1


def test_the_sensitivity_counts_the_pages_whose_loss_would_be_detected(case: Case) -> None:
    case.device_writes(0, b"early", time_ns=900)
    case.device_writes(PAGE, b"write_once")
    case.device_writes(2 * PAGE, b"twice")
    case.device_writes(2 * PAGE + 8, b"twice")
    case.device_writes(3 * PAGE, b"s", kind=WriteKind.STATUS)
    case.links[Link.LOG].see(9 * PAGE, PAGE, 1)
    assert case.sensitivity() == Sensitivity(
        writes=5,
        written=4,
        rewritten=3,
        guaranteed_detectable=1,
        unreported=0,
        unreported_guaranteed=0,
        reported_unwritten=1,
    )


def test_an_empty_journal_is_not_evidence(case: Case) -> None:
    assert case.sensitivity() == Sensitivity(0, 0, 0, 0, 0, 0, 0)
    verdict = Verdict(PAGES, [], case.sensitivity(), GuestOutcome(1000, 0, 10))
    assert verdict.exit_code == 3
    assert verdict.sentence.startswith("nothing was tested")


def test_without_a_journal_the_cause_of_a_loss_is_unknown(case: Case) -> None:
    for ram in (case.source, case.destination):
        os.pwrite(ram.fd, b"same", PAGE)
    os.pwrite(case.source.fd, b"data", PAGES // 2 * PAGE)
    differing = compare(case.source, case.destination)
    lost = attribute(differing, case.source, case.destination, case.evidence().slots, [])
    assert lost == [LostPage(PAGES // 2 * PAGE, HIGH, 4, Blame.UNKNOWN)]
    verdict = Verdict(
        PAGES, lost, sensitivity_by_guest(20, guaranteed=True), GuestOutcome(1000, 0, 10)
    )
    assert verdict.exit_code == 1
    assert "cause unknown" in verdict.sentence


def test_without_a_journal_the_guest_is_the_evidence_source() -> None:
    healthy = GuestOutcome(1000, 0, 10)
    assert Verdict(PAGES, [], sensitivity_by_guest(20, guaranteed=True), healthy).exit_code == 0
    assert Verdict(PAGES, [], sensitivity_by_guest(0, guaranteed=True), healthy).exit_code == 3
    members = sensitivity_by_guest(20, guaranteed=True).to_json()
    assert (members["guaranteed_detectable"], members["rewritten"], members["evidence_source"]) == (
        20,
        20,
        "guest",
    )
    assert members["unreported"] is None
    copied = sensitivity_by_guest(20, guaranteed=False)
    assert (copied.rewritten, copied.guaranteed_detectable) == (20, 0)
    assert Verdict(PAGES, [], copied, healthy).exit_code == 0
    assert Sensitivity(1, 2, 3, 4, 5, 6, 7).to_json()["unreported"] == 5


def test_a_loss_exits_with_1_and_a_proof_without_evidence_with_3() -> None:
    sensitive = Sensitivity(10, 10, 5, 5, 0, 0, 0)
    insensitive = Sensitivity(10, 10, 0, 0, 0, 0, 0)
    healthy, failing = GuestOutcome(1000, 0, 10), GuestOutcome(1000, 2, 10)
    lost = LostPage(0, 0, 1, Blame.ACCELERATOR)
    assert Verdict(PAGES, [], sensitive, healthy).exit_code == 0
    assert Verdict(PAGES, [], insensitive, healthy).exit_code == 3
    assert Verdict(PAGES, [], sensitive, failing).exit_code == 1
    assert Verdict(PAGES, [lost], sensitive, healthy).exit_code == 1
    assert Verdict(PAGES, [lost], insensitive, healthy).exit_code == 1
    assert "1 by the accelerator" in Verdict(PAGES, [lost], sensitive, healthy).sentence


def test_a_slow_switchover_fails_an_otherwise_passing_proof() -> None:
    sensitive, healthy = Sensitivity(10, 10, 5, 5, 0, 0, 0), GuestOutcome(1000, 0, 10)
    slow = Downtime([Part("its start", 1.0), Part("its end", 2.5)], 3.0)
    assert Verdict(PAGES, [], sensitive, healthy, downtime=slow).exit_code == 1
    assert "the downtime was 3.5 s, longer than the 3 s" in slow.sentence
    sentence = Verdict(PAGES, [], sensitive, healthy, downtime=slow).sentence
    assert "longest part took 2.5 s: its end" in sentence
    at_limit, unlimited = replace(slow, limit_s=3.5), replace(slow, limit_s=None)
    assert Verdict(PAGES, [], sensitive, healthy, downtime=at_limit).exit_code == 0
    assert Verdict(PAGES, [], sensitive, healthy, downtime=unlimited).exit_code == 0
    unmeasured = Downtime((), 3.0)
    assert Verdict(PAGES, [], sensitive, healthy, downtime=unmeasured).exit_code == 3
    lost = [LostPage(0, 0, 1, Blame.ACCELERATOR)]
    assert "1 of" in Verdict(PAGES, lost, sensitive, healthy, downtime=slow).sentence


def test_slots_of_another_file_are_ignored(case: Case) -> None:
    case.device_writes(3 * PAGE, b"x", seen_by=())
    (page,) = case.lost()
    assert page.gpa == 3 * PAGE
    evidence = case.evidence()
    others = [slot._replace(device=slot.device + 1) for slot in evidence.slots]
    differing = compare(case.source, case.destination)
    (page,) = attribute(differing, case.source, case.destination, others, [evidence])
    assert page.gpa is None


def test_a_write_of_zero_bytes_touches_only_its_own_page() -> None:
    records = np.zeros(3, dtype=RECORD)
    records["gpa"] = (0, PAGE, 2 * PAGE - 1)
    records["length"] = (0, 0, 2)
    assert WrittenPages(records).pages.tolist() == [0, 1, 1, 2]


def test_pages_that_a_snapshot_saved_too_late_fail_a_proof() -> None:
    sensitive = sensitivity_by_guest(7, EvidenceSource.SNAPSHOT)
    lost = [LostPage(0, 0, 4, Blame.SNAPSHOT)]
    torn = Verdict(PAGES, lost, sensitive, GuestOutcome(0, 0, 0))
    assert torn.exit_code == 1
    assert torn.sentence.startswith(
        f"1 of {PAGES} pages have a newer content than at the start of the snapshot"
    )
    assert sensitive.to_json()["evidence_source"] == "snapshot"


def test_a_fault_in_the_log_fails_a_proof_whose_pages_are_equal() -> None:
    log = LogEvidence(looks=100, look_interval_s=0.001, judged_queues=[0, 1])
    verdict = Verdict(64, [], sensitivity_by_guest(5), GuestOutcome(1, 0, 1), settled_s=4, log=log)
    assert (verdict.exit_code, verdict.sentence) == (0, "all pages are equal: 64 pages compared")
    late = replace(verdict, log=replace(log, late_bits=[0x1000, 0x5000]))
    assert late.exit_code == 1
    assert "2 dirty bits were set after" in late.sentence
    unlogged = replace(verdict, log=replace(log, unlogged_queues=[1]))
    assert unlogged.exit_code == 1
    assert "used ring of queue 1" in unlogged.sentence


def test_a_verdict_without_a_journal_names_what_it_could_not_detect() -> None:
    log = LogEvidence(looks=100, look_interval_s=0.001)
    verdict = Verdict(64, [], sensitivity_by_guest(5), GuestOutcome(1, 0, 1), settled_s=4, log=log)
    assert any("4.0 s after the guest was paused" in each for each in verdict.unseen)
    assert any("1.0 ms" in each for each in verdict.unseen)
    assert any("used ring" in each and "too few" in each for each in verdict.unseen)
    assert replace(verdict, sensitivity=Sensitivity(5, 5, 5, 5, 0, 0, 0)).unseen == []


def test_early_bits_and_late_dma_are_blamed_on_the_device() -> None:
    lost = [LostPage(offset, offset, 9, Blame.UNKNOWN) for offset in (0x1000, 0x2000, 0x3000)]
    log = LogEvidence(looks=1, look_interval_s=0, early_bits=[0x1000, 0x9000])
    lost = blame_early_bits(lost, log)
    late = [LostPage(offset, offset, None, Blame.LATE_DMA) for offset in (0x1000, 0x2000, 0x7000)]
    found = with_late_dma(lost, late)
    assert sorted((page.ram_offset, page.blame.value) for page in found) == [
        (0x1000, "early-bit"),
        (0x2000, "late-dma"),
        (0x3000, "unknown"),
        (0x7000, "late-dma"),
    ]
    verdict = Verdict(64, found, sensitivity_by_guest(5), GuestOutcome(1, 0, 1))
    assert verdict.exit_code == 1
    assert "2 by DMA after the guest had been paused" in verdict.sentence
    assert "1 cause unknown" in verdict.sentence
