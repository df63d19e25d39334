"""Third-party devices: the recipes of docs/third-party-devices.md."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.devices import inside_qemu
from qmp_tools.guest.build import cache, fresh_folder
from qmp_tools.guest.workload import Workload
from qmp_tools.host.archive import Archive, own_codename, unpack
from qmp_tools.proof.soak import TOOL
from qmp_tools.qemu.builds import QemuBuild, fetch, installed, make_whole
from support.command import TIMEOUT_S, Outcome, Tool

ROOT: Final = Path(__file__).parents[2]
RECIPES: Final = (ROOT / "docs" / "third-party-devices.md").read_text()


def faulty(fault: str, *harvest: str) -> str:
    """Return the command of a back end with a fault, or with 'none'."""
    program = str(ROOT / "tests" / "back_ends" / "faulty.py")
    return shlex.join([sys.executable, program, "{socket}", fault, *harvest])


FAULTY: Final = faulty("drop-pages=0.05")

SLOW: Final = shlex.join(
    [sys.executable, str(ROOT / "tests" / "back_ends" / "slow.py"), "{socket}"]
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
BRIEF: Final = ("--requests-after", "200", "--workload", "write_once=1400")
REFUSALS: Final = {
    "nvme": ["State blocked by non-migratable device"],
    "lsi53c895a": ["lsi_pre_save: Assertion", "has not become ready within"],
}
"""Defects of old QEMUs; see docs/third-party-devices.md."""


def recipe(program: str, word: str = "") -> list[str]:
    """Return the first recipe for `program` with `word` in the docs, with JSON output."""
    commands = re.findall(r"(?m)^    (dmaproof prove (?:.*\\\n)*.*)$", RECIPES)
    command = next(
        text for text in commands if f"--device-command '{program} " in text and word in text
    )
    return [*shlex.split(command)[1:], "--quiet", "--json", "-"]


def prove(tool: Tool, *arguments: str) -> Outcome:
    return tool.run("prove", "--quiet", "--json", "-", *arguments)


def assert_passed(
    outcome: Outcome, device: str, *, certain: bool = True, least: int = 1000
) -> None:
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert report["setup"]["device"] == device
    assert report["setup"]["tracker"] is None
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] == 0
    assert report["sensitivity"]["evidence_source"] == "guest"
    assert report["sensitivity"]["rewritten"] >= least
    assert (report["sensitivity"]["guaranteed_detectable"] > 0) == certain
    assert report["sensitivity"]["unreported"] is None


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


@functools.cache
def newer_qemu() -> QemuBuild:
    """A QEMU fetched from Debian 13 or later, with its virtiofsd."""
    build = next(
        (each for each in installed(X86_64) if each.path.with_name("virtiofsd").exists()), None
    )
    return build or fetch("trixie", X86_64)


def on_newer_qemu(program: str, *command: str) -> list[str]:
    """Return the recipe that runs `program`, as the words `command`, with a fetched QEMU."""
    arguments = recipe(program)
    arguments[arguments.index("--qemu") + 1] = str(newer_qemu().path)
    at = arguments.index("--device-command") + 1
    arguments[at] = " ".join([*command, arguments[at].removeprefix(program)])
    return arguments


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


def dpdk() -> list[str]:
    """testpmd (the system's, or fetched once), and the options to find its drivers."""
    if testpmd := shutil.which("dpdk-testpmd"):
        return [testpmd]
    # Not below the temporary folder: DPDK loads nothing from a world-writable folder.
    target = cache() / f"dpdk-{own_codename()}"
    with fresh_folder(target) as fresh:
        if fresh is not None:
            archive = Archive(own_codename(), fresh / "apt")
            for package in archive.fetch_closure(["dpdk-dev"]):
                unpack(package, fresh / "root")
            make_whole(fresh, {"dpdk-testpmd": "usr/bin"})
            shutil.rmtree(fresh / "apt")
    folder = next((target / "root/usr/lib").glob("*/dpdk/pmds-*"))
    drivers = [f"-d {folder}/librte_{name}.so" for name in ("net_vhost", "mempool_ring")]
    return [str(target / "dpdk-testpmd"), *drivers]


def test_dpdk(tool: Tool) -> None:
    arguments = on_newer_qemu("dpdk-testpmd", *dpdk())
    assert_passed(tool.run(*arguments, *BRIEF), "net by dpdk-testpmd", certain=False)


def test_a_network_that_does_not_echo_is_reported_with_both_counts_and_its_log(tool: Tool) -> None:
    program = str(ROOT / "tests" / "back_ends" / "silent.py")
    command = shlex.join([sys.executable, program, "{socket}", "net"])
    qemu = str(newer_qemu().path)
    outcome = prove(tool, "--qemu", qemu, "--device", "net", "--device-command", command)
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert re.search(r"the guest sent \d{4} frames and received 0 of them", outcome.errors)
    assert "the network must send every frame back" in outcome.errors
    assert "device.log:\n    silent" in outcome.errors


def test_a_dpdk_that_takes_frames_and_sends_none(tool: Tool) -> None:
    arguments = on_newer_qemu("dpdk-testpmd", *dpdk())
    at = arguments.index("--device-command") + 1
    arguments[at] += " --forward-mode=rxonly"
    outcome = tool.run(*arguments)
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert "and received 0 of them" in outcome.errors
    assert "VHOST_CONFIG: " in outcome.errors  # DPDK's log


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
