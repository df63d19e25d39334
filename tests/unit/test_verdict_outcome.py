"""The effect of each finding on the verdict: exit code, sentence, and whether to continue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmp_tools.migration.downtime import Downtime
from qmp_tools.migration.judgement import Blame
from qmp_tools.migration.log_watch import LogEvidence
from qmp_tools.proof.attribution import LostPage
from qmp_tools.proof.changes import Changes
from qmp_tools.proof.rings import Ring
from qmp_tools.proof.sensitivity import Sensitivity, sensitivity_by_guest
from qmp_tools.proof.verdict import GuestOutcome, Verdict

SENSITIVE = Sensitivity(10, 10, 5, 5, 0, 0, 0)
PASSED = Verdict(64, [], SENSITIVE, GuestOutcome(1000, 0, 10))
RING = Ring("source", "virtio-blk", 3, 128, 97, 100, 110)
OTHER_RING = replace(RING, queue=4)


def test_a_proof_without_a_loss_passes_and_can_continue() -> None:
    assert (PASSED.exit_code, PASSED.can_continue) == (0, True)
    assert PASSED.sentence == "all pages are equal: 64 pages compared"


def test_a_wrong_ring_fails_by_itself() -> None:
    wrong = replace(PASSED, wrong_rings=[RING])
    assert (wrong.exit_code, wrong.can_continue) == (1, False)
    assert wrong.sentence == f"the index of a ring is wrong: {RING.story}"
    two = replace(PASSED, wrong_rings=[RING, OTHER_RING])
    assert two.sentence == f"the indices of 2 rings are wrong: {RING.story}"


def test_a_refusal_stops_the_guest_and_names_what_was_not_compared() -> None:
    refused = replace(PASSED, refusal="no", pages=0, sensitivity=replace(SENSITIVE, unreported=2))
    assert (refused.exit_code, refused.can_continue) == (1, False)
    assert refused.sentence.startswith("no page was compared, because the destination refused")
    assert replace(refused, pages=64).sentence.startswith("all pages are equal, but 2")
    assert not replace(refused, pages=0, refusal=None).sentence.startswith("no page was compared")


def test_errors_of_the_guest_are_reported() -> None:
    failing = replace(PASSED, guest=GuestOutcome(1000, 2, 10))
    assert failing.exit_code == 1
    assert failing.sentence.endswith("the guest found 2 errors on the destination")
    restarted = replace(failing, guest=GuestOutcome(0, 1, 0, awaiting_restart=4))
    assert restarted.sentence.endswith(
        "1 error on the destination, whose device was killed and restarted"
    )


def test_a_migration_that_ended_early_proves_nothing() -> None:
    early = replace(PASSED, ended_early=True)
    assert early.exit_code == 3
    assert early.sentence.startswith("too little was tested")


def test_a_scenario_that_tested_too_little_proves_nothing_but_a_loss() -> None:
    untested = replace(PASSED, untested="the device waited for no page")
    assert untested.exit_code == 3
    assert untested.sentence == "too little was tested: the device waited for no page"
    assert replace(untested, guest=GuestOutcome(1000, 2, 10)).exit_code == 1


def test_what_changed_on_a_running_destination_is_reported() -> None:
    changed = replace(PASSED, changes=Changes(by_devices=5, by_guest=2, not_compared=PASSED.pages))
    assert changed.exit_code == 0
    assert changed.sentence.endswith("written on the destination: 0 pages compared")
    assert changed.unseen == [
        f"a loss of any of the {PASSED.pages} pages that the guest may write itself; 2 of them "
        "differ"
    ]


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
def test_a_fault_in_the_log_fails_although_all_pages_are_equal(
    log: LogEvidence, message: str
) -> None:
    found = replace(PASSED, log=log)
    assert found.exit_code == 1
    assert found.sentence.startswith("all pages are equal, but ")
    assert message in found.sentence


def test_faults_that_a_missing_journal_could_hide_are_named() -> None:
    assert PASSED.unseen == []
    alone = replace(PASSED, sensitivity=sensitivity_by_guest(7), settled_s=4.0)
    assert alone.sensitivity == sensitivity_by_guest(7, guaranteed=True)
    assert alone.unseen == ["DMA later than 4.0 s after the guest was paused"]
    watched = replace(alone, settled_s=None, log=LogEvidence(9, 0.0025, judged_queues=[1]))
    assert len(watched.unseen) == 3
    assert "less than about 2.5 ms before it writes" in watched.unseen[0]
    assert "if the device logs something else on the same page" in watched.unseen[1]
    assert "dirty bits that the device drops when it is stopped" in watched.unseen[2]


def test_a_loss_is_reported_with_each_culprit_and_each_fault_of_the_log() -> None:
    culprits = (Blame.QEMU, Blame.DEVICE, Blame.QEMU)
    lost = [LostPage(0x1000 * page, None, 1, blame) for page, blame in enumerate(culprits)]
    log = LogEvidence(9, 0.001, late_bits=[0], judged_queues=[1, 3], unlogged_queues=[1, 3])
    assert replace(PASSED, lost=lost, log=log).sentence == (
        "3 of 64 pages were lost: 1 by the device's dirty tracking, 2 by QEMU, although the device "
        "reported them dirty in time; 1 dirty bits were set after QEMU had read the log for the "
        "last time; the device never logged its writes to the used ring of queue 1, 3"
    )


@pytest.mark.parametrize(
    ("found", "end"),
    [
        (
            replace(PASSED, refusal="no", pages=0),
            "; 0 pages that the device wrote were never reported dirty",
        ),
        (
            replace(PASSED, sensitivity=replace(SENSITIVE, unreported=2)),
            " 2 pages that the device wrote were never reported dirty: QEMU sent the new content "
            "for another reason",
        ),
        (
            replace(PASSED, sensitivity=replace(SENSITIVE, unreported=1)),
            " 1 page that the device wrote was never reported dirty: QEMU sent the new content "
            "for another reason",
        ),
        (
            replace(PASSED, ended_early=True),
            " before the guest had used all its write-once pages, although dmaproof tried to hold "
            "it in precopy until then",
        ),
        (
            replace(PASSED, sensitivity=replace(SENSITIVE, rewritten=0)),
            "; give the guest more time or the migration less bandwidth",
        ),
        (
            replace(PASSED, lost=[LostPage(0, 0, 4, Blame.SNAPSHOT)]),
            ": QEMU does not hold back the writes of a device outside QEMU while it takes a "
            "snapshot",
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
    assert early.endswith(
        "500.0 ms before it writes the data, or any time before on a page that is reused"
    )
    assert unjudged == (
        "a used ring that the device does not log: it set too few dirty bits before it was "
        "stopped, or QEMU does not report where the ring is"
    )
    assert forgotten == (
        "dirty bits that the device drops when it is stopped, except those of pages that it wrote "
        "just before"
    )
    _, judged, _ = replace(alone, log=replace(log, judged_queues=[1])).unseen
    assert judged == (
        "a used ring that the device does not log, if the device logs something else on the same "
        "page"
    )


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
