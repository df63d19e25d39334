"""Proofs of guests of another architecture than the machine's, under TCG."""

from __future__ import annotations

import shutil

import pytest

from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.qemu.builds import installed
from support.command import Tool


@pytest.fixture
def newer_qemu() -> str:
    """A QEMU of Debian 13 or later: the system's may be that of Debian 12."""
    builds = installed(AARCH64)
    if not builds:
        pytest.skip("needs a newer QEMU: dmaproof qemu fetch 11.1 --arch aarch64")
    return str(builds[-1].path)


@pytest.fixture
def system_qemu() -> str:
    if (found := shutil.which(AARCH64.qemu_program)) is None:
        pytest.skip(f"needs {AARCH64.qemu_program}: apt-get install qemu-system-arm")
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("--guest", "linux", "--ring", "packed", "--scenario", "multifd-4"),
        ("--guest", "linux", "--scenario", "memory-hotplug"),
        ("--guest", "linux", "--device", "qemu:nvme"),
        ("--guest", "bare", "--scenario", "device-hotplug"),
        ("--guest", "bare", "--iommu", "smmuv3"),
    ],
    ids=" ".join,
)
def test_every_page_survives_on_arm64(
    tool: Tool, newer_qemu: str, options: tuple[str, ...]
) -> None:
    report = tool.run(
        "prove", "--arch", "aarch64", "--qemu", newer_qemu, *options, "--json", "-"
    ).report
    assert report["exit_code"] == 0, report["verdict"]
    assert report["setup"]["arch"] == "aarch64"
    assert report["setup"]["accelerator"] == "tcg"
    assert report["sensitivity"]["guaranteed_detectable"] >= 512
    assert not tool.leftovers()


def test_the_probe_finds_what_the_emulated_vcpu_loses(tool: Tool, system_qemu: str) -> None:
    options = ("--arch", "aarch64", "--guest", "bare", "--ring", "packed")
    outcome = tool.run("prove", *options, "--qemu", system_qemu, "--json", "-")
    report = outcome.report
    assert report["exit_code"] == 0, report["verdict"]
    # QEMU 7.2 loses pages at sizes such as 128 MiB, so dmaproof chooses another one.
    changed = "a probe lost" in outcome.errors
    assert report["setup"]["memory"] == ("131080K" if changed else "128M")
    lossy = tool.run(
        "prove", *options, "--qemu", system_qemu, "--memory", "128M", "--json", "-"
    ).report
    assert (lossy["lost"]["accelerator"] > 0) is changed, lossy["verdict"]


def test_a_fault_is_caught_on_arm64(tool: Tool, newer_qemu: str) -> None:
    options = ("--arch", "aarch64", "--qemu", newer_qemu, "--guest", "linux")
    report = tool.run("prove", *options, "--fault", "drop-pages", "--json", "-").report
    assert report["exit_code"] == 1, report["verdict"]
    assert report["lost"]["device"] == len(report["lost_pages"]) > 10
    assert {page["link"] for page in report["lost_pages"]} == {"log"}


def test_a_qemu_for_another_architecture_is_refused(tool: Tool, system_qemu: str) -> None:
    outcome = tool.run("prove", "--qemu", system_qemu)
    assert outcome.exit_code == 2
    assert f"{system_qemu} emulates aarch64, but the guest is for x86_64" in outcome.errors
    assert "--arch aarch64" in outcome.errors
