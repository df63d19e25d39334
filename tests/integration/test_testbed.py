"""The test bed: a migration like QEMU's without QEMU, which detects every injected fault."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import RefusedError, UntestableError
from dmaproof.faults import known_faults
from dmaproof.trace import Link
from qmp_tools.cli import main as cli
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.migration.judgement import Blame
from qmp_tools.proof.attribution import LostPage
from qmp_tools.proof.sensitivity import Sensitivity
from qmp_tools.proof.verdict import GuestOutcome, Verdict
from qmp_tools.testbed import fault_trials
from qmp_tools.testbed.fault_trials import CONTROL, Bench, Means, Row, Trial, judge
from qmp_tools.testbed.precopy import PAGE_BYTES, Place, Precopy
from qmp_tools.testbed.ring_driver import ram_fd
from qmp_tools.testbed.simulation import simulate
from support.command import TIMEOUT_S, Tool, is_alive

LOW, HIGH = Place(0, 3 * PAGE_BYTES, 0), Place(1 << 20, 70 * PAGE_BYTES, 3 * PAGE_BYTES)


def test_precopy_sends_what_is_logged_or_written_by_a_vcpu() -> None:
    with ram_fd(73 * PAGE_BYTES) as ram, ram_fd(73 * PAGE_BYTES) as copy, ram_fd(64) as log:
        precopy = Precopy(ram, copy, (LOW, HIGH))

        def write(page: int, content: bytes) -> None:
            os.pwrite(ram, content, page * PAGE_BYTES)

        def arrived(page: int) -> bytes:
            return os.pread(copy, 1, page * PAGE_BYTES)

        write(0, b"a")
        precopy.send_all()
        assert arrived(0) == b"a"
        precopy.set_log(log)
        for page in (0, 2, 72):
            write(page, b"b")
        os.pwrite(log, bytes([0b101]), 0)  # pages 0 and 2
        os.pwrite(log, bytes([0b100000]), (256 + 69) // 8)  # the high slot's last page
        precopy.pass_on()
        assert [arrived(page) for page in (0, 2, 72)] == [b"b"] * 3
        assert os.pread(log, 64, 0) == bytes(64), "every bit was taken from the log"
        assert set(np.flatnonzero(precopy.logged_ns)) == {0, 2, 72}
        write(1, b"c")
        precopy.pass_on()
        assert arrived(1) == b"\0", "the page was not marked dirty"
        precopy.cpu_wrote(PAGE_BYTES + 5, 1)
        precopy.pass_on()
        assert arrived(1) == b"c"
        assert precopy.logged_ns[1] == 0


def test_a_replaced_log_is_synced_once_more() -> None:
    size = 73 * PAGE_BYTES
    with ram_fd(size) as ram, ram_fd(size) as copy, ram_fd(64) as old, ram_fd(64) as new:
        precopy = Precopy(ram, copy, (LOW, HIGH))
        precopy.set_log(old)
        os.pwrite(ram, b"x", 0)
        os.pwrite(old, b"\x01", 0)
        precopy.set_log(new)
        os.pwrite(ram, b"y", PAGE_BYTES)
        os.pwrite(old, b"\x02", 0)
        precopy.pass_on()
        assert os.pread(copy, 1, 0) == b"x"
        assert os.pread(copy, 1, PAGE_BYTES) == b"\0"


@pytest.mark.parametrize("tracker", sorted(emulated_trackers()))
@pytest.mark.parametrize("harvest", ["0.005", "final", "immediate"])
def test_without_a_fault_every_page_survives(tmp_path: Path, tracker: str, harvest: str) -> None:
    verdict = simulate(DeviceOptions(tracker=tracker, harvest=harvest, seed=3), tmp_path)
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.guaranteed_detectable == 1061 + 77
    if tracker not in ("coarse", "sequence-pair"):  # these trackers do not distinguish single pages
        assert verdict.sensitivity.reported_unwritten == 0


@pytest.mark.parametrize("tracker", sorted(emulated_trackers()))
def test_behind_an_iommu_every_page_survives(tmp_path: Path, tracker: str) -> None:
    options = DeviceOptions(tracker=tracker, harvest="0.005", seed=3)
    verdict = simulate(options, tmp_path, iommu=True)
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.guaranteed_detectable == 1061 + 77
    if tracker not in ("coarse", "sequence-pair"):
        assert verdict.sensitivity.reported_unwritten == 0


@pytest.mark.parametrize("form", ["immediate", "packed", "killed", "two"])
def test_behind_an_iommu_every_page_survives_in_every_form(tmp_path: Path, form: str) -> None:
    verdict = simulate(
        DeviceOptions(harvest="immediate" if form == "immediate" else "final", seed=5),
        tmp_path,
        devices=2 if form == "two" else 1,
        packed=form == "packed",
        killed=form == "killed",
        iommu=True,
    )
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.written >= 1061 + 77


@pytest.mark.parametrize("fault", ["drop-pages=0.05", "off-by-one-end", "clear-before-read"])
def test_behind_an_iommu_a_loss_is_attributed_to_its_link(tmp_path: Path, fault: str) -> None:
    options = DeviceOptions(harvest="0.005", seed=3, fault=fault)
    verdict = simulate(options, tmp_path, iommu=True)
    link = known_faults()[fault.partition("=")[0]].link
    assert {page.link for page in verdict.lost} == {link}


def test_every_page_survives_with_packed_rings(tmp_path: Path) -> None:
    verdict = simulate(DeviceOptions(harvest="0.005", seed=3), tmp_path, packed=True)
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.guaranteed_detectable == 1061 + 77


def test_unlogged_writes_to_a_packed_ring_are_lost(tmp_path: Path) -> None:
    options = DeviceOptions(harvest="0.005", seed=3, fault="used-ring-unlogged")
    verdict = simulate(options, tmp_path, packed=True)
    assert {(page.link, page.kind) for page in verdict.lost} == {(Link.TRACKER, "used ring")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("harvest", ["0.005", "final", "immediate"])
def test_a_killed_device_loses_nothing(tmp_path: Path, harvest: str, packed: bool) -> None:
    options = DeviceOptions(harvest=harvest, seed=3)
    verdict = simulate(options, tmp_path, packed=packed, killed=True)
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.written >= 1061 + 77
    assert verdict.sensitivity.reported_unwritten > 0, (
        "the device reports everything at the restart"
    )


def test_dirty_bits_that_a_killed_device_forgets_are_lost(tmp_path: Path) -> None:
    options = DeviceOptions(harvest="final", seed=3, fault="forgotten-at-restart")
    verdict = simulate(options, tmp_path, killed=True)
    assert {page.link for page in verdict.lost} == {Link.TRACKER}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("harvest", ["0.005", "final", "immediate"])
def test_a_reset_device_loses_nothing(tmp_path: Path, harvest: str, packed: bool) -> None:
    options = DeviceOptions(harvest=harvest, seed=3)
    verdict = simulate(options, tmp_path, packed=packed, reset=True)
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.guaranteed_detectable == 1061 + 77


@pytest.mark.parametrize("fault", ["log-forgotten-at-reset", "index-kept-at-reset"])
def test_without_a_reset_its_faults_do_not_show(tmp_path: Path, fault: str) -> None:
    verdict = simulate(DeviceOptions(harvest="0.005", seed=3, fault=fault), tmp_path)
    assert verdict.exit_code == 0, verdict


def test_two_devices_share_a_log(tmp_path: Path) -> None:
    verdict = simulate(DeviceOptions(harvest="0.002", seed=3), tmp_path, devices=2)
    assert verdict.exit_code == 0, verdict
    assert verdict.sensitivity.guaranteed_detectable == 1061 + 77


@pytest.mark.parametrize("name", [CONTROL, *known_faults()])
def test_every_fault_is_caught_at_its_link(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["faults", "--on", "testbed", "--only", name, "--runs", "3", "--json", "-"]
    assert cli.main([*command, "--quiet"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["faults"]
    assert row["caught"] == (0 if name == CONTROL else 3)
    for trial in row["trials"]:
        assert trial["untested"] is None
        if name == "index-kept-at-reset":
            assert trial["caught_by"] == ["ring"]
            continue
        assert ("comparison" in trial["caught_by"]) is (name != CONTROL)
        assert set(trial["links"]) == (set() if name == CONTROL else {row["link"]})


def test_a_fault_that_does_nothing_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command reports this, regardless of the fault's name."""
    ineffective = fault_trials.TestbedForm("=0.0000001")
    monkeypatch.setitem(fault_trials.TESTBED_FORMS, "drop-pages", ineffective)
    assert cli.main(["faults", "--on", "testbed", "--only", "drop-pages", "--quiet"]) == 1


def test_a_refusal_of_the_device_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(end_gpa: int) -> int:
        return 8

    monkeypatch.setattr("qmp_tools.testbed.simulation.log_bytes_needed", too_small)
    with pytest.raises(RefusedError, match="SET_LOG_BASE"):
        simulate(DeviceOptions(), tmp_path)
    assert fault_trials.try_on_testbed(CONTROL, 1, tmp_path, 60).caught_by == (Means.REFUSAL,)


@pytest.mark.parametrize(
    ("error", "caught_by"),
    [
        (RefusedError("ring 2: it is misaligned"), (Means.REFUSAL,)),
        (UntestableError("the destination refused the state of a device"), ()),
    ],
)
def test_the_type_of_an_error_decides_whether_the_device_refused(
    error: UntestableError,
    caught_by: tuple[Means, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise error

    monkeypatch.setattr(fault_trials, "simulate", fail)
    trial = fault_trials.try_on_testbed(CONTROL, 1, tmp_path, 60)
    assert trial.caught_by == caught_by
    assert trial.untested == (None if caught_by else str(error))


def test_a_simulation_leaves_no_open_file_thread_or_mapping(tmp_path: Path) -> None:
    def remaining() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return (
            len(list(Path("/proc/self/fd").iterdir())),
            threading.active_count(),
            maps.count("guest-ram"),
        )

    simulate(DeviceOptions(seed=1), tmp_path)
    before = remaining()
    for seed in range(3):
        simulate(DeviceOptions(seed=seed), tmp_path)
    assert remaining() == before
    assert before[2] == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_test_bed_leaves_nothing(tool: Tool, how: signal.Signals) -> None:
    command = ["faults", "--on", "testbed", "--only", "non-atomic-or", "--runs", "100"]
    running = tool.start(*command)
    running.wait_for(lambda: "device" in running.children(), "a device process")
    device = running.children()["device"]
    running.process.send_signal(how)
    outcome = running.finish()
    assert outcome.exit_code == (-how if how == signal.SIGKILL else 3)
    assert "Traceback" not in outcome.errors
    deadline_s = time.monotonic() + TIMEOUT_S
    while is_alive(device) or tool.leftovers():
        assert time.monotonic() < deadline_s, (is_alive(device), tool.leftovers())
        time.sleep(0.05)


# What counts as caught --------------------------------------------------------------------------


def row(*trials: Trial, fault: str = "drop-pages") -> Row:
    return Row(fault, "log", "…", Bench.QEMU, trials)


def test_a_fault_counts_as_caught_only_at_the_broken_link() -> None:
    right = Trial(1, (Means.COMPARISON,), {"log": 3})
    wrong = Trial(2, (Means.COMPARISON,), {"log": 3, "qemu": 1})
    uncaught = Trial(3)
    assert row(right).as_wanted
    assert not row(wrong).as_wanted
    assert not row(uncaught).as_wanted
    assert row(*[right] * 19, uncaught).as_wanted
    assert not row(*[right] * 18, uncaught, uncaught).as_wanted
    assert row(Trial(1, (Means.REFUSAL,))).as_wanted
    assert not row(right, Trial(2, untested="no QEMU")).as_wanted
    assert row(uncaught, fault=CONTROL).as_wanted
    assert not row(*[uncaught] * 19, right, fault=CONTROL).as_wanted


def test_a_fault_that_loses_no_page_is_caught_by_a_ring_alone() -> None:
    def row(*trials: Trial) -> Row:
        return Row("index-kept-at-reset", "", "…", Bench.QEMU, trials)

    assert row(Trial(1, (Means.RING,))).as_wanted
    assert not row(Trial(1, (Means.COMPARISON,))).as_wanted
    assert not row(Trial(1, (Means.RING, Means.COMPARISON), {"log": 1})).as_wanted


def test_pages_that_a_vcpu_lost_do_not_count_for_a_fault() -> None:
    sensitive = Sensitivity(10, 10, 5, 5, 0, 0, 0)
    vcpu = LostPage(0, 0, 1, Blame.ACCELERATOR)
    trial = judge(Verdict(64, [vcpu], sensitive, GuestOutcome(1000, 0, 10)), 1)
    assert trial.caught_by == ()
    assert trial.untested is not None
    clean = judge(Verdict(64, [], sensitive, GuestOutcome(1000, 0, 10)), 1)
    assert (clean.caught_by, clean.untested) == ((), None)
    unreported = Sensitivity(10, 10, 5, 5, 2, 0, 0, {"tracker": 2})
    assert judge(Verdict(64, [], unreported, GuestOutcome(1000, 0, 10)), 1).links == {"tracker": 2}
