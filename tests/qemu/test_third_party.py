"""Third-party devices: the recipes of docs/third-party-devices.md."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.devices import inside_qemu
from qmp_tools.guest.workload import Workload
from qmp_tools.proof.soak import TOOL
from support.command import TIMEOUT_S, Outcome, Tool
from support.recipes import BRIEF, assert_passed, newer_qemu, on_newer_qemu, prove, recipe

ROOT: Final = Path(__file__).parents[2]


def faulty(fault: str, *harvest: str) -> str:
    """Return the command of a back end with a fault, or with 'none'."""
    program = str(ROOT / "tests" / "back_ends" / "faulty.py")
    return shlex.join([sys.executable, program, "{socket}", fault, *harvest])


FAULTY: Final = faulty("drop-pages=0.05")

SLOW: Final = shlex.join(
    [sys.executable, str(ROOT / "tests" / "back_ends" / "slow.py"), "{socket}"]
)

RESTARTABLE: Final = shlex.join(
    [
        *(sys.executable, str(ROOT / "tests" / "back_ends" / "restartable.py")),
        *("{socket}", "{folder}/written"),
    ]
)

DYING: Final = (
    "import socket, sys\n"
    "print('about to end', flush=True)\n"
    "listener = socket.socket(socket.AF_UNIX)\n"
    "listener.bind(sys.argv[1])\n"
    "exec(sys.argv[2])\n"
    "sys.exit(7)"
)
"""A back end that binds its socket and then only follows its arguments."""

DISKS: Final = [
    name
    for name, kind in inside_qemu.KINDS.items()
    if not kind.network and name != "virtio-blk-pci"
]
REFUSALS: Final = {
    "nvme": ["State blocked by non-migratable device"],
    "lsi53c895a": ["lsi_pre_save: Assertion", "has not become ready within"],
}
"""Defects of old QEMUs; see docs/third-party-devices.md."""


def assert_passed_or_released_rings(outcome: Outcome) -> None:
    """The proof passed, or failed as docs/third-party-devices.md says of a busy machine."""
    if outcome.exit_code == 0:
        assert_passed(outcome, "blk by qemu-storage-daemon")
    else:
        assert_released_rings(outcome)


def assert_released_rings(outcome: Outcome) -> None:
    """The device has released its rings with requests in flight."""
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert any(
        "requests were not answered" in message for message in report["guest"]["error_messages"]
    ), report
    assert report["guest"]["errors"] <= Workload().threads
    lost = report["lost"]  # some pages may be written after the comparison
    assert lost["unknown"] + lost["late-dma"] == len(report["lost_pages"])


def test_qemu_storage_daemon(tool: Tool) -> None:
    outcome = tool.run(*recipe("qemu-storage-daemon"))
    assert_passed_or_released_rings(outcome)
    assert "source device" in outcome.report["commands"]
    assert tool.leftovers() == []


def test_requests_that_qemu_storage_daemon_drops_are_missed(tool: Tool) -> None:
    outcome = tool.run(*recipe("qemu-storage-daemon", "throttle"))
    assert_released_rings(outcome)
    assert outcome.report["lost_pages"]


def test_a_back_end_may_serve_the_linux_guest_and_a_second_destination(tool: Tool) -> None:
    arguments = recipe("qemu-storage-daemon")
    guest = arguments.index("--guest")
    arguments[guest + 1] = "linux"
    outcome = tool.run(*arguments, "--scenario", "retry")
    assert_passed_or_released_rings(outcome)


def test_each_qemu_gets_a_new_back_end(tool: Tool) -> None:
    outcome = tool.run(*recipe("qemu-storage-daemon"), "--scenario", "ping-pong")
    assert_passed_or_released_rings(outcome)
    migrations = outcome.report["migrations"]
    assert all(
        migration["guaranteed_detectable"] >= Workload().write_once * 3 // 4
        for migration in migrations
    )
    assert len(migrations) == 3 or outcome.exit_code


def test_migrations_in_a_row_of_a_device_inside_qemu(tool: Tool) -> None:
    options = ("--device", "qemu:virtio-blk-pci", "--migrations", "3")
    outcome = tool.run("soak", "--guest", "bare", *options, "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert [migration["guaranteed_detectable"] for migration in report["migrations"]] == [
        Workload().write_once
    ] * 3
    assert [migration["errors"] for migration in report["migrations"]] == [0] * 3
    assert [growth["process"] for growth in report["growth"]] == [TOOL]


def test_a_page_lost_by_a_third_party_device_is_detected(tool: Tool) -> None:
    outcome = prove(tool, "--guest", "bare", "--device-command", FAULTY)
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert "cause unknown" in report["verdict"]
    assert len(report["lost_pages"]) == report["lost"]["unknown"] > 100
    assert all(page["gpa"] is not None for page in report["lost_pages"])
    assert report["guest"]["errors"] > 100


def watch(tool: Tool, command: str, *arguments: str) -> Outcome:
    """Run a short proof of a back end whose two sides have a disk each."""
    options = ("--requests-after", "200", "--workload", "write_once=1024,churn=1024,write_every=0")
    return prove(tool, "--guest", "bare", "--device-command", command, *options, *arguments)


def test_qemu_must_refuse_postcopy_with_a_device_without_pagefault(tool: Tool) -> None:
    command = ("--device-command", faulty("no-pagefault"))
    outcome = prove(tool, "--guest", "bare", "--scenario", "postcopy", *command)
    assert (outcome.exit_code, outcome.report["unsupported"]) == (3, True), outcome.errors
    assert "lacks the vhost-user protocol feature PAGEFAULT" in outcome.report["verdict"]


def test_a_third_party_device_without_a_fault_passes(tool: Tool) -> None:
    outcome = watch(tool, faulty("none", "immediate"), "--settle", "1")
    assert_passed(outcome, f"blk by {Path(sys.executable).name}", least=768)
    report = outcome.report
    assert report["settled_s"] >= 1
    assert report["log"]["judged_queues"] == [0, 1]
    assert report["log"]["unlogged_queues"] == report["log"]["late_bits"] == []
    assert len(report["unseen"]) == 4


def test_dma_after_the_device_has_stopped_is_seen(tool: Tool) -> None:
    outcome = watch(tool, faulty("dma-after-stop=2"))
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    (page,) = outcome.report["lost_pages"]
    # On a busy machine the DMA may precede the comparison, which then shows it.
    assert page["blame"] in ("late-dma", "unknown")


def test_a_dirty_bit_that_comes_before_its_data_is_seen(tool: Tool) -> None:
    outcome = watch(tool, faulty("bit-before-data=0.005", "immediate"), "--settle", "1")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    assert outcome.report["lost"]["early-bit"] > 0


def test_a_used_ring_that_is_not_logged_is_seen(tool: Tool) -> None:
    outcome = watch(tool, faulty("used-ring-unlogged", "immediate"), "--settle", "1")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    assert outcome.report["lost_pages"] == []
    assert outcome.report["log"]["unlogged_queues"] == [0, 1]


def test_a_flush_that_is_missing_when_the_device_stops_is_seen(tool: Tool) -> None:
    # The longer the interval, the less likely it ends just before the stop.
    outcome = watch(tool, faulty("no-final-flush", "0.5"), "--settle", "1")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    assert outcome.report["log"]["late_bits"]


# On a busy machine up to eight requests are available that the device has not taken yet.
@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        # A source that notices the refusal resumes for a moment, with the wrong index.
        ("right-3", "3 too low|finished 3 more requests"),
        ("0", "too low"),
        ("right+64", "at least (5[6-9]|6[0-4]) too high"),
    ],
)
def test_a_wrong_ring_index_is_the_back_ends_fault(tool: Tool, answer: str, wrong: str) -> None:
    junit = tool.folder.parent / "junit.xml"
    arguments = ("--workload", "write_once=256,churn=512", "--junit", str(junit))
    command = ("--device-command", faulty(f"base={answer}"))
    outcome = prove(tool, "--guest", "bare", *arguments, *command)
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert "answered GET_VRING_BASE with" in report["verdict"]
    (ring, _) = report["wrong_rings"]
    assert re.search(wrong, ring["story"])
    assert (report["refusal"] is not None) == (answer == "right-3")
    assert report["lost_pages"] == []
    assert "every ring index is right" in junit.read_text()
    assert tool.leftovers() == []


def test_a_run_without_sensitivity_is_not_a_pass_without_a_journal(tool: Tool) -> None:
    arguments = ("--device", "qemu:virtio-blk-pci", "--workload", "write_once=0")
    outcome = prove(tool, "--guest", "bare", *arguments)
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert outcome.report["verdict"].startswith("nothing was tested")


@pytest.mark.parametrize("guest", ["bare", "linux"])
def test_virtio_blk_inside_qemu(tool: Tool, guest: str) -> None:
    outcome = prove(tool, "--guest", guest, "--device", "qemu:virtio-blk-pci", *BRIEF)
    assert_passed(outcome, "qemu:virtio-blk-pci")


@pytest.mark.parametrize("name", DISKS)
def test_disks_inside_qemu(tool: Tool, name: str) -> None:
    outcome = prove(tool, "--device", f"qemu:{name}", *BRIEF)
    if outcome.exit_code == 3:
        assert any(refusal in outcome.errors for refusal in REFUSALS.get(name, [])), outcome.errors
    else:
        assert_passed(outcome, f"qemu:{name}")


def test_virtiofsd(tool: Tool) -> None:
    program = str(newer_qemu().path.with_name("virtiofsd"))
    arguments = on_newer_qemu("virtiofsd", program)
    assert_passed(tool.run(*arguments, *BRIEF), "fs by virtiofsd")


def test_a_virtiofsd_that_qemu_does_not_migrate(tool: Tool) -> None:
    program = "/usr/lib/qemu/virtiofsd"
    if not Path(program).exists():
        pytest.skip(f"no {program} here: it was part of QEMU 7.2 in Debian 12")
    outcome = tool.run(*recipe(program))
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert "non-migratable device" in outcome.errors
    assert "vhost-user-fs" in outcome.errors


@pytest.mark.parametrize("name", [name for name, kind in inside_qemu.KINDS.items() if kind.network])
def test_networks_inside_qemu(tool: Tool, name: str) -> None:
    outcome = prove(tool, "--device", f"qemu:{name}", *BRIEF)
    if "is not a valid device model name" in outcome.errors:
        assert name == "igb"  # QEMU has it from 8.0 on
    else:
        assert_passed(outcome, f"qemu:{name}", certain=False)


@pytest.mark.parametrize("until", ["", "listener.listen()", "listener.listen(); listener.accept()"])
def test_a_back_end_that_ends_at_once_is_reported_with_its_last_output(
    tool: Tool, until: str
) -> None:
    command = shlex.join([sys.executable, "-c", DYING, "{socket}", until])
    outcome = prove(tool, "--guest", "bare", "--device-command", command)
    assert outcome.exit_code == 3
    assert re.search(r"(source|destination) device ended with exit code 7\n", outcome.errors)
    assert "about to end" in outcome.errors


@pytest.mark.parametrize("victim", ["back end", "tool"])
def test_nothing_is_left_after_a_kill(tool: Tool, victim: str) -> None:
    # The shell stays, so the back end is a grandchild of dmaproof.
    command = shlex.join(["sh", "-c", f"{FAULTY}; exit 7"])
    arguments = ("--guest", "bare", "--device-command", command, "--bandwidth", "8M")
    running = tool.start("prove", *arguments)
    running.wait_for_line("migration active")
    (back_end,) = of_run(tool, "source-disk.sock", "faulty.py")
    if victim == "tool":
        running.process.kill()
    else:
        os.kill(back_end, signal.SIGKILL)
    outcome = running.finish()
    if victim == "back end":
        assert outcome.exit_code == 3, outcome.errors
        assert "source device ended with exit code 7" in outcome.errors
    deadline = time.monotonic() + TIMEOUT_S
    while tool.leftovers() or of_run(tool):
        assert time.monotonic() < deadline, (tool.leftovers(), of_run(tool))
        time.sleep(0.05)


def of_run(tool: Tool, *words: str) -> list[int]:
    """Return the processes whose command lines have the test's folder and all `words`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().split(b"\0")
            if line[0] != b"sh" and all(
                any(word.encode() in part for part in line) for word in (str(tool.folder), *words)
            ):
                found.append(int(entry.name))
    return found


def test_a_device_that_stops_slowly_is_reported(tool: Tool) -> None:
    options = [
        "--guest",
        "bare",
        "--workload",
        "write_once=512,write_every=0",
        "--max-downtime",
        "0.4",
    ]
    outcome = prove(tool, *options, "--device-command", SLOW)
    assert outcome.exit_code == 1, outcome.errors
    report = outcome.report
    assert not report["lost_pages"]
    assert "longest part" in report["verdict"]
    slowest = max(report["downtime"]["parts"], key=lambda part: float(part["seconds"]))
    assert slowest["what"].startswith("QEMU stops the vCPUs and its devices")
    assert slowest["seconds"] >= 0.5


def test_qemu_discards_the_dirty_bits_of_a_back_end_that_is_killed(tool: Tool) -> None:
    outcome = tool.run(*recipe("qemu-storage-daemon"), "--kill-device")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert report["setup"]["killed"]
    assert report["lost"]["qemu"] > 0
    assert report["sensitivity"]["guaranteed_detectable"] > 1000
    assert tool.leftovers() == []


def test_a_back_end_that_notes_no_requests_repeats_them_after_a_kill(tool: Tool) -> None:
    outcome = tool.run(*recipe("qemu-storage-daemon", "--kill-destination-device"))
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] > 0
    assert report["guest"]["awaiting_restart"] > 0
    assert "whose device was killed and restarted" in report["verdict"]
    assert any("INFLIGHT_SHMFD" in message for message in report["guest"]["error_messages"])
    assert tool.leftovers() == []


def test_a_back_end_that_notes_its_requests_survives_a_kill_on_the_destination(tool: Tool) -> None:
    outcome = prove(
        tool, "--guest", "bare", "--kill-destination-device", "--device-command", RESTARTABLE
    )
    assert_passed(outcome, f"blk by {Path(sys.executable).name}")
    assert outcome.report["guest"]["awaiting_restart"] > 0
    assert outcome.report["guest"]["requests"] >= 1000


def test_packed_rings_that_a_back_end_does_not_offer_are_not_tested(tool: Tool) -> None:
    outcome = tool.run(*recipe("qemu-storage-daemon"), "--ring", "packed")
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert "without VIRTIO_F_RING_PACKED: the back end or QEMU does not offer it" in outcome.errors


def test_packed_rings_of_a_third_party_device_pass(tool: Tool) -> None:
    outcome = watch(tool, faulty("none", "immediate"), "--settle", "1", "--ring", "packed")
    assert_passed(outcome, f"blk by {Path(sys.executable).name}", least=768)
    assert outcome.report["log"]["judged_queues"] == []
