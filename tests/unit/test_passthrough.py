"""The parts of the passthrough proofs that run outside L1."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from dmaproof.errors import TrackerError, WaitTimeoutError
from dmaproof.iova_bitmap import IovaRange
from dmaproof.vfio.requests import VfioError
from qmp_tools.guest.channel import GuestLateError
from qmp_tools.migration.judgement import Blame
from qmp_tools.migration.migration import MigrationError, MigrationTimeoutError
from qmp_tools.passthrough import clock, differential
from qmp_tools.passthrough.fake_device import content, dropped_pages
from qmp_tools.passthrough.inside import claimed, order
from qmp_tools.passthrough.outcome import (
    NothingTestedError,
    NotSupportedError,
    Proof,
    ProofFailedError,
    State,
    require,
    require_loss,
    require_pass,
    retrying,
    run,
)
from qmp_tools.passthrough.prove import machines_side_by_side, to_json, to_text
from qmp_tools.passthrough.tracking import Tracking
from qmp_tools.proof.attribution import LostPage
from qmp_tools.proof.sensitivity import Sensitivity
from qmp_tools.proof.verdict import GuestOutcome, Verdict
from qmp_tools.qemu.qmp import QmpTimeoutError
from qmp_tools.reports.junit_tap import to_junit, to_tap

PAGE = 4096
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
JOURNAL = np.dtype([("sequence", "<u8"), ("iova", "<u8"), ("length", "<u8")])


def splitmix(value: int) -> int:
    mask = (1 << 64) - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


@pytest.mark.parametrize(("iova", "length"), [(0, 8), (5, 1), (4091, 13), (1 << 40, 4096)])
def test_content_follows_the_rule_of_control_h(iova: int, length: int) -> None:
    sequence = 3
    expected = bytes(
        splitmix(sequence * 0x9E3779B97F4A7C15 & (1 << 64) - 1 ^ at // 8) >> at % 8 * 8 & 0xFF
        for at in range(iova, iova + length)
    )
    assert content(sequence, iova, length).tobytes() == expected
    assert content(sequence + 1, iova, 16).tobytes() != content(sequence, iova, 16).tobytes()


def test_the_share_of_dropped_pages_is_about_the_parameter() -> None:
    pages = np.arange(100_000, dtype=np.uint64)
    for drop in (0, 50, 1000):
        share = float(dropped_pages(pages, drop, 1).mean())
        assert abs(share - drop / 1000) < 0.01
    assert (dropped_pages(pages, 50, 1) != dropped_pages(pages, 50, 2)).any()


def test_only_the_queried_part_of_a_write_is_expected() -> None:
    journal = np.array([(1, PAGE - 1, 2), (2, 3 * PAGE, 1), (3, 9 * PAGE, 4 * PAGE)], dtype=JOURNAL)
    bits = differential.expected_bits(journal, IovaRange(PAGE, 9 * PAGE), PAGE)
    assert int(bits[0]) == 0b1_0000_0101


def test_a_page_with_few_bytes_written_may_be_unchanged() -> None:
    journal = np.array([(1, 1, 1), (2, 2 * PAGE - 1, 2 * PAGE), (3, 5 * PAGE, 16)], dtype=JOURNAL)
    sure = differential.surely_changed(journal, IovaRange(0, 8 * PAGE))
    assert np.flatnonzero(sure).tolist() == [2, 3, 5]


def test_random_writes_stay_inside_the_window() -> None:
    window = IovaRange(1 << 32, 1 << 20)
    writes = differential.random_writes(random.Random(1), window, 2000)
    assert all(
        window.iova <= iova and iova + length <= sum(window) and length > 0
        for iova, length in writes
    )
    assert any(iova % PAGE for iova, _ in writes)
    assert any(length > 4 * PAGE for _, length in writes)


def test_a_proof_that_does_not_hold_is_reported_and_not_raised() -> None:
    def fails() -> tuple[str, dict[str, Any]]:
        require(False, "3 pages missing")
        return "never", {}

    def breaks() -> tuple[str, dict[str, Any]]:
        raise TrackerError("EINVAL")

    def holds() -> tuple[str, dict[str, Any]]:
        require(True, "nothing")
        return "equal", {"cases": 1}

    outcomes = [run("group", "name", proof) for proof in (fails, breaks, holds)]
    assert [outcome.state for outcome in outcomes] == ["fails", "fails", "holds"]
    assert [outcome.found for outcome in outcomes] == ["3 pages missing", "EINVAL", "equal"]
    with pytest.raises(ProofFailedError):
        fails()


def test_the_report_counts_by_group_and_shows_failures() -> None:
    rows: list[dict[str, Any]] = [
        {"group": "rules", "name": "a", "state": "holds", "found": "x", "figures": {}},
        {"group": "rules", "name": "b", "state": "fails", "found": "no error", "figures": {}},
    ]
    rows = [{**row, "seconds": 1.5} for row in rows]
    found = {"kernel": "7.3", "seed": 1, "seconds": 9.0, "outcomes": rows}
    text = to_text(to_json(found))
    assert text.startswith("FAIL: 1 of 2 proofs do not hold: the passthrough route on kernel 7.3")
    assert to_json(found)["exit_code"] == 1
    assert "1 of 2 hold, 3 s" in text
    assert "FAILED rules: b: no error" in text
    assert to_text(to_json({**found, "outcomes": rows[:1]})).startswith("PASS: every proof holds")


# Attempts that test nothing -----------------------------------------------------------------------


def proof_of(*attempts: Exception | tuple[str, dict[str, Any]]) -> Proof:
    """A proof whose attempts end like this, one after another."""
    remaining = list(attempts)

    def proof() -> tuple[str, dict[str, Any]]:
        attempt = remaining.pop(0)
        if isinstance(attempt, Exception):
            raise attempt
        return attempt

    return proof


def test_an_attempt_without_a_result_is_repeated_and_the_outcome_says_so() -> None:
    equal = ("equal", {"pages": 1})
    assert retrying(proof_of(equal))() == ("equal", {"pages": 1, "tries": 1})
    proof = proof_of(NothingTestedError("0 pages"), MigrationError("no end"), equal)
    found, figures = retrying(proof)()
    assert found == "equal; attempt 3, after failed ones: 0 pages; no end"
    assert figures == {"pages": 1, "tries": 3}


@pytest.mark.parametrize(
    "last",
    [
        NothingTestedError("no page"),
        QmpTimeoutError("no answer"),
        GuestLateError("no report"),
        MigrationTimeoutError("no end"),
    ],
)
def test_a_proof_whose_attempts_all_test_nothing_is_untested(last: Exception) -> None:
    starved = (NothingTestedError("0 pages"), WaitTimeoutError("late"), last)
    outcome = run("migration", "name", retrying(proof_of(*starved, ("equal", {}))))
    assert outcome.state is State.UNTESTED
    assert outcome.found == f"3 attempts failed: 0 pages; late; {last}"
    assert run("rules", "name", proof_of(WaitTimeoutError("late"))).state is State.UNTESTED


def test_a_failed_migration_is_repeated_but_a_failed_proof_is_not() -> None:
    lost = run("migration", "name", retrying(proof_of(ProofFailedError("3 pages differ"))))
    assert (lost.state, lost.found) == (State.FAILS, "3 pages differ")
    broken: list[Exception] = [WaitTimeoutError("late")]
    broken += [MigrationError("the migration failed")] * 2
    assert run("migration", "name", retrying(proof_of(*broken))).state is State.FAILS


def test_an_untested_proof_is_neither_a_pass_nor_a_failure() -> None:
    starved = report("7.3", "11.1", row("a", "holds"), row("b", "untested"))
    assert (starved["exit_code"], "1 could not be tested" in starved["verdict"]) == (3, True)
    assert "not tested migration: b: b: untested" in to_text(starved)
    assert '<error message="b: untested"' in to_junit(starved)
    failed = report("7.3", "11.1", row("a", "fails"), row("b", "untested"))
    assert failed["exit_code"] == 1
    assert VALIDATOR.is_valid(starved)


LOST = LostPage(0, 0, 1, Blame.DEVICE)


def verdict(lost: Sequence[LostPage], detectable: int) -> Verdict:
    sensitivity = Sensitivity(9, 9, detectable, detectable, 0, 0, 0)
    return Verdict(64, lost, sensitivity, GuestOutcome(1000, 0, 10))


def test_a_verdict_without_detectable_pages_fails_only_the_attempt() -> None:
    require_pass(verdict([], detectable=5))
    require_loss(verdict([LOST], detectable=0), "summary")
    with pytest.raises(NothingTestedError):
        require_pass(verdict([], detectable=0))
    with pytest.raises(NothingTestedError):
        require_loss(verdict([], detectable=0), "summary")
    with pytest.raises(ProofFailedError, match="1 of 64 pages were lost") as failed:
        require_pass(verdict([LOST], detectable=0))
    assert not isinstance(failed.value, NothingTestedError)
    with pytest.raises(
        ProofFailedError, match="the injected fault was not noticed, summary"
    ) as unseen:
        require_loss(verdict([], detectable=5), "summary")
    assert not isinstance(unseen.value, NothingTestedError)


def test_a_wait_is_stretched_where_l1_s_clock_is_too_fast(tmp_path: Path) -> None:
    begin = clock.Moment(host=1000.0, l1=5.0)
    assert clock.stretch(100.0, begin, clock.Moment(1001.0, 8.0)) == 300.0
    assert clock.stretch(100.0, begin, clock.Moment(1004.0, 8.0)) == 100.0
    assert clock.stretch(100.0, begin, clock.Moment(1000.0, 8.0)) == 100.0
    assert clock.Clocks(tmp_path).in_l1(100.0) >= 100.0
    assert not list(tmp_path.iterdir())


# Machines side by side ----------------------------------------------------------------------------


def test_each_proof_is_claimed_by_exactly_one_machine(tmp_path: Path) -> None:
    first, second = claimed(range(5), tmp_path), claimed(range(5), tmp_path)
    assert [next(first), next(second), next(second), next(first)] == [0, 1, 2, 3]
    assert [*second, *first] == [4]


def test_the_first_machine_alone_carries_out_the_selftests_and_begins_with_them() -> None:
    groups = ["rules", "states", "selftests", "selftests", "vhost"]
    assert order(groups, 1) == [2, 3, 0, 1, 4]
    assert order(groups, 2) == [0, 1, 4]


@pytest.mark.parametrize(
    ("processors", "free_mib", "machines"), [(1, 9000, 1), (2, 9000, 2), (8, 9000, 2), (2, 2000, 1)]
)
def test_a_second_machine_needs_a_processor_and_memory_of_its_own(
    processors: int, free_mib: int, machines: int
) -> None:
    assert machines_side_by_side(processors, free_mib << 20) == machines


# Features that the kernel or QEMU does not have ---------------------------------------------------


def proof_that_raises(error: Exception) -> Proof:
    def proof() -> tuple[str, dict[str, Any]]:
        raise error

    return proof


def test_an_unknown_request_is_unsupported_but_a_refused_one_fails() -> None:
    errors = (
        NotSupportedError("no property iommufd"),
        VfioError("REPORT", errno.EOPNOTSUPP, None),
        VfioError("TEST", errno.ENOTTY, None),
        VfioError("START", errno.EINVAL, None),
        FileNotFoundError("/dev/iommu"),
    )
    outcomes = [run("rules", "name", proof_that_raises(error)) for error in errors]
    assert [outcome.state for outcome in outcomes] == ["lacking"] * 3 + ["fails"] * 2
    assert outcomes[0].found == "no property iommufd"


def row(name: str, state: str, group: str = "migration", **figures: int) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "state": state,
        "passed": state == "holds",
        "lacking": state == "lacking",
        "found": f"{name}: {state}",
        "figures": figures,
        "seconds": 2.5,
    }


def report(kernel: str, qemu: str, *rows: dict[str, Any]) -> dict[str, Any]:
    found = {"kernel": kernel, "qemu": qemu, "seed": 1, "seconds": 9.0, "outcomes": list(rows)}
    return to_json(found)


def test_an_unsupported_feature_is_neither_a_failure_nor_a_pass() -> None:
    some = report("6.1", "10.0", row("a", "holds"), row("b", "lacking"))
    assert (some["exit_code"], "1 of 2 proofs hold, 1 do not apply" in some["verdict"]) == (
        0,
        True,
    )
    assert "unsupported migration: b: b: lacking" in to_text(some)
    nothing = report("6.1", "7.2", row("a", "lacking"))
    assert nothing["exit_code"] == 3
    assert to_text(nothing).startswith("UNTESTED")
    assert report("6.1", "7.2", row("a", "lacking"), row("b", "fails"))["exit_code"] == 1


def test_junit_and_tap_have_skipped_proofs() -> None:
    answer = report("6.1", "10.0", row("a", "holds"), row("b", "lacking"))
    assert '<skipped message="b: lacking"' in to_junit(answer)
    assert 'name="migration: a" time="2.5"' in to_junit(answer)
    assert "ok 2 - migration: b # SKIP b: lacking" in to_tap(answer)


def test_arguments_follow_what_this_qemu_s_vfio_pci_has() -> None:
    device = Path("/sys/bus/mdev/devices/x")
    new = {
        *("sysfsdev", "enable-migration", "rombar", "iommufd"),
        *("x-device-dirty-page-tracking", "x-pre-copy-dirty-page-tracking"),
    }
    arguments = " ".join(Tracking(device=False).arguments(device, new))
    assert ",enable-migration=on,rombar=0,x-device-dirty-page-tracking=off,iommufd=" in arguments
    old = {"sysfsdev", "x-enable-migration", "rombar", "x-pre-copy-dirty-page-tracking"}
    arguments = " ".join(Tracking(iommufd=False, precopy=False).arguments(device, old))
    assert ",x-enable-migration=on,rombar=0,x-pre-copy-dirty-page-tracking=off" in arguments
    with pytest.raises(NotSupportedError, match="no property iommufd"):
        Tracking().arguments(device, old)
    with pytest.raises(NotSupportedError, match="x-device-dirty-page-tracking"):
        Tracking(iommufd=False, device=False).arguments(device, old)
