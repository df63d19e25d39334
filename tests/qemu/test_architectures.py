"""Proofs of the Linux guest of another architecture than the machine's, under TCG."""

from __future__ import annotations

import pytest

from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.choice import find_qemu
from support.architectures import require_guests
from support.command import Tool


@pytest.fixture
def qemu() -> str:
    """A QEMU that loses no page, or the system's."""
    require_guests(AARCH64)
    builds = installed(AARCH64)
    return str(builds[-1].path if builds else find_qemu(None, AARCH64))


@pytest.mark.parametrize(
    "options",
    [
        ("--ring", "packed", "--scenario", "multifd-4"),
        ("--scenario", "memory-hotplug"),
        ("--device", "qemu:nvme"),
    ],
    ids=" ".join,
)
def test_every_page_survives_on_arm64(tool: Tool, qemu: str, options: tuple[str, ...]) -> None:
    arguments = ("--arch", "aarch64", "--guest", "linux", "--qemu", qemu, *options)
    report = tool.run("prove", *arguments, "--json", "-").report
    assert report["exit_code"] == 0, report["verdict"]
    assert report["setup"]["arch"] == "aarch64"
    assert report["setup"]["accelerator"] == "tcg"
    assert report["sensitivity"]["guaranteed_detectable"] >= 1000
    assert not tool.leftovers()


def test_a_fault_is_caught_on_arm64(tool: Tool, qemu: str) -> None:
    options = ("--arch", "aarch64", "--qemu", qemu, "--guest", "linux", "--fault", "drop-pages")
    report = tool.run("prove", *options, "--json", "-").report
    assert report["exit_code"] == 1, report["verdict"]
    assert report["lost"]["device"] == len(report["lost_pages"]) > 10
    assert {page["link"] for page in report["lost_pages"]} == {"log"}


def test_a_qemu_for_another_architecture_is_refused(tool: Tool, qemu: str) -> None:
    outcome = tool.run("prove", "--qemu", qemu)
    assert outcome.exit_code == 2
    assert f"{qemu} emulates aarch64, but the guest is for x86_64" in outcome.errors
    assert "--arch aarch64" in outcome.errors
