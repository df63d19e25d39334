"""What each finding makes of the verdict: its exit code, its sentence, and whether to continue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmp_tools.migration.downtime import Downtime
from qmp_tools.migration.judgement import Blame
from qmp_tools.migration.log_watch import LogEvidence
from qmp_tools.proof.attribution import LostPage
from qmp_tools.proof.rings import Ring
from qmp_tools.proof.sensitivity import Sensitivity, sensitivity_by_guest
from qmp_tools.proof.verdict import GuestOutcome, Verdict

SHARP = Sensitivity(10, 10, 5, 5, 0, 0, 0)
PASSED = Verdict(64, [], SHARP, GuestOutcome(1000, 0, 10))
RING = Ring("source", "virtio-blk", 3, 128, 97, 100, 110)
OTHER_RING = replace(RING, queue=4)


def test_a_proof_without_a_loss_passes_and_can_continue() -> None:
    assert (PASSED.exit_code, PASSED.can_go_on) == (0, True)
    assert PASSED.sentence == "every page equal: 64 pages compared"


def test_a_wrong_ring_fails_by_itself() -> None:
    wrong = replace(PASSED, wrong_rings=[RING])
    assert (wrong.exit_code, wrong.can_go_on) == (1, False)
    assert wrong.sentence == f"the index of a ring is wrong: {RING.story}"
    two = replace(PASSED, wrong_rings=[RING, OTHER_RING])
    assert two.sentence == f"the indices of 2 rings are wrong: {RING.story}"


def test_a_refusal_stops_the_guest_and_names_what_was_not_compared() -> None:
    refused = replace(PASSED, refusal="no", pages=0, sensitivity=replace(SHARP, unreported=2))
    assert (refused.exit_code, refused.can_go_on) == (1, False)
    assert refused.sentence.startswith("no page was compared, as the destination refused")
    assert replace(refused, pages=64).sentence.startswith("every page equal, but by luck: 2")
    assert not replace(refused, pages=0, refusal=None).sentence.startswith("no page was compared")


def test_errors_of_the_guest_are_reported() -> None:
    ill = replace(PASSED, guest=GuestOutcome(1000, 2, 10))
    assert ill.exit_code == 1
    assert "the guest found 2 errors on the destination" in ill.sentence


def test_a_migration_that_ended_early_proves_nothing() -> None:
    early = replace(PASSED, ended_early=True)
    assert early.exit_code == 3
    assert early.sentence.startswith("too little was tested")


def test_a_limit_without_a_measurement_proves_nothing() -> None:
    unmeasured = replace(PASSED, downtime=Downtime((), 3.0))
    assert unmeasured.exit_code == 3
    assert "the downtime could not be measured" in unmeasured.sentence


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (LogEvidence(9, 0.001, late_bits=[4096]), "1 dirty bits were set after"),
        (LogEvidence(9, 0.001, judged_queues=[1], unlogged_queues=[1]), "ring of queue 1"),
    ],
)
def test_a_fault_in_the_log_fails_though_every_page_is_equal(
    log: LogEvidence, message: str
) -> None:
    found = replace(PASSED, log=log)
    assert found.exit_code == 1
    assert found.sentence.startswith("every page equal, but by luck; ")
    assert message in found.sentence


def test_losses_that_a_missing_journal_could_hide_are_named() -> None:
    assert PASSED.unseen == []
    alone = replace(PASSED, sensitivity=sensitivity_by_guest(7), settled_s=4.0)
    assert alone.sensitivity == sensitivity_by_guest(7, guaranteed=True)
    assert alone.unseen == ["DMA later than 4.0 s after the guest was paused"]
    watched = replace(alone, settled_s=None, log=LogEvidence(9, 0.0025, judged_queues=[1]))
    assert len(watched.unseen) == 3
    assert "by less than about 2.5 ms" in watched.unseen[0]
    assert "whose page the device marks for something else" in watched.unseen[1]
    assert "bits that are forgotten when the device is stopped" in watched.unseen[2]


def test_a_loss_is_reported_with_each_culprit_and_each_fault_of_the_log() -> None:
    culprits = (Blame.QEMU, Blame.DEVICE, Blame.QEMU)
    lost = [LostPage(0x1000 * page, None, 1, blame) for page, blame in enumerate(culprits)]
    log = LogEvidence(9, 0.001, late_bits=[0], judged_queues=[1, 3], unlogged_queues=[1, 3])
    assert replace(PASSED, lost=lost, log=log).sentence == (
        "3 of 64 pages were lost: 1 by the device's dirty tracking, 2 by QEMU's handling of the "
        "device's log; 1 dirty bits were set after QEMU had read the log for the last time; the "
        "device never logged its writes to the used ring of queue 1, 3"
    )


@pytest.mark.parametrize(
    ("found", "end"),
    [
        (
            replace(PASSED, refusal="no", pages=0),
            "; 0 pages that the device wrote have not reached the dirty log",
        ),
        (
            replace(PASSED, sensitivity=replace(SHARP, unreported=2)),
            ": 2 pages that the device wrote have not reached the dirty log",
        ),
        (
            replace(PASSED, ended_early=True),
            " before the guest had used its write-once pages, though it was to be held in precopy until "
            "then",
        ),
        (
            replace(PASSED, sensitivity=replace(SHARP, rewritten=0)),
            "; give the guest more time or the migration less bandwidth",
        ),
        (
            replace(PASSED, lost=[LostPage(0, 0, 4, Blame.SNAPSHOT)]),
            ": QEMU took it, and does not hold off what a device outside QEMU writes",
        ),
        (
            replace(PASSED, lost=[LostPage(0, 0, 4, Blame.UNKNOWN)]),
            "the device keeps no journal",
        ),
    ],
)
def test_a_sentence_ends_with_the_reason_or_with_what_to_do(found: Verdict, end: str) -> None:
    assert found.sentence.endswith(end)


def test_what_could_not_be_detected_is_named_in_whole_phrases() -> None:
    log = LogEvidence(9, 0.5)
    alone = replace(PASSED, sensitivity=sensitivity_by_guest(7), log=log)
    early, unjudged, forgotten = alone.unseen
    assert early.endswith("by less than about 500.0 ms, or on pages that are used again")
    assert unjudged == (
        "an unlogged used ring: too few dirty bits came before the device was stopped, or QEMU "
        "does not say where the ring is"
    )
    assert forgotten == (
        "bits that are forgotten when the device is stopped, of pages that it has not written just "
        "before"
    )
    _, judged, _ = replace(alone, log=replace(log, judged_queues=[1])).unseen
    assert judged == "an unlogged used ring whose page the device marks for something else in it"


@pytest.mark.parametrize(
    ("ring", "end"),
    [
        (RING, ", and the answer must lie between them"),
        (replace(RING, available=300), ": the device's last writes to its used ring are missing"),
        (
            replace(RING, side="destination", available=99),
            ": the driver's last writes to its available ring are missing",
        ),
    ],
)
def test_a_wrong_ring_is_named_and_explained(ring: Ring, end: str) -> None:
    assert ring.story.startswith("queue 3 of virtio-blk: ")
    assert ring.story.endswith(end)
