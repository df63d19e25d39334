"""The freestanding guest on networks that send frames back, and on SCSI disks."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.qemu.choice import find_qemu
from support.architectures import require_guests
from support.command import Outcome, Tool
from support.recipes import BRIEF, assert_passed, newer_qemu, newest_qemu, prove

BACK_ENDS = Path(__file__).parents[1] / "back_ends"
PYTHON = Path(sys.executable).name
INSIDE_QEMU = ("virtio-net-pci", "virtio-scsi-pci")
QEMUS: Final[dict[str, Callable[[], Path]]] = {
    "default": lambda: find_qemu(None),
    "newer": lambda: newer_qemu().path,
    "newest": lambda: newest_qemu().path,
}


def prove_bare(tool: Tool, *arguments: str) -> Outcome:
    return prove(tool, "--guest", "bare", *arguments, *BRIEF)


def back_end(program: str, *arguments: str) -> tuple[str, str]:
    """Return the option that starts one of the tests' back ends."""
    words = [sys.executable, str(BACK_ENDS / program), "{socket}", *arguments]
    return ("--device-command", shlex.join(words))


@pytest.mark.parametrize("qemu", QEMUS)
@pytest.mark.parametrize("name", INSIDE_QEMU)
def test_a_device_inside_qemu_passes(tool: Tool, name: str, qemu: str) -> None:
    outcome = prove_bare(tool, "--device", f"qemu:{name}", "--qemu", str(QEMUS[qemu]()))
    assert_passed(outcome, f"qemu:{name}")
    assert outcome.report["setup"]["guest"] == "bare"


@pytest.mark.parametrize("name", INSIDE_QEMU)
def test_a_device_inside_qemu_passes_on_arm64(tool: Tool, name: str) -> None:
    require_guests(AARCH64)
    outcome = prove_bare(tool, "--device", f"qemu:{name}", "--arch", "aarch64")
    assert_passed(outcome, f"qemu:{name}")


@pytest.mark.parametrize("scenario", ["device-reset", "driver-reload", "guest-reboot"])
def test_a_scsi_host_inside_qemu_is_reset(tool: Tool, scenario: str) -> None:
    outcome = prove_bare(tool, "--device", "qemu:virtio-scsi-pci", "--scenario", scenario)
    assert_passed(outcome, "qemu:virtio-scsi-pci", least=500)


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_dmaproofs_network_passes_behind_an_iommu(tool: Tool, ring: str) -> None:
    outcome = prove_bare(tool, "--device", "echo", "--ring", ring, "--iommu", "intel")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert (report["setup"]["ring"], report["setup"]["iommu"]) == (ring, "intel")
    assert report["guest"]["errors"] == 0
    assert report["sensitivity"]["rewritten"] >= 1400


def test_pages_that_dmaproofs_network_loses_are_detected(tool: Tool) -> None:
    outcome = prove_bare(tool, "--device", "echo", "--fault", "drop-pages=0.05")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert len(report["lost_pages"]) > 20
    assert {page["link"] for page in report["lost_pages"]} == {"log"}
    assert report["guest"]["errors"] > 20


def test_frames_that_are_lost_repeated_swapped_or_foreign_are_no_errors(tool: Tool) -> None:
    outcome = prove_bare(tool, "--device", "net", *back_end("unreliable_network.py"))
    assert_passed(outcome, f"net by {PYTHON}", least=400)
    # A page into which the device wrote a wrong frame is not a write-once page.
    assert outcome.report["sensitivity"]["rewritten"] < 1400


@pytest.mark.parametrize(
    ("device", "command"),
    [
        ("net", back_end("unreliable_network.py", "drop-pages=0.05")),
        ("scsi", back_end("scsi_target.py", "{image}", "drop-pages=0.05")),
    ],
    ids=["net", "scsi"],
)
def test_pages_that_a_third_party_loses_are_detected(
    tool: Tool, device: str, command: tuple[str, str]
) -> None:
    outcome = prove_bare(tool, "--device", device, *command)
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    assert len(outcome.report["lost_pages"]) == outcome.report["lost"]["unknown"] > 20
    assert outcome.report["guest"]["errors"] > 20


@pytest.mark.parametrize("options", [(), ("--ring", "packed", "--iommu", "intel")])
def test_a_scsi_target_passes(tool: Tool, options: tuple[str, ...]) -> None:
    command = back_end("scsi_target.py", "{image}")
    assert_passed(prove_bare(tool, "--device", "scsi", *command, *options), f"scsi by {PYTHON}")


def test_a_network_that_does_not_echo_is_reported(tool: Tool) -> None:
    outcome = prove_bare(tool, "--device", "net", *back_end("silent.py", "net"))
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert "the network must send every frame back" in outcome.errors
