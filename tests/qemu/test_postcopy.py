"""Postcopy on real QEMUs: the paused and the running destination, faults, and what QEMU refuses."""

from __future__ import annotations

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu.builds import installed
from support.command import Outcome, Tool

LEAST_GUARANTEED = 8000
BUILDS = [None, *(str(build.path) for build in installed(X86_64))]
"""The system's QEMU, and those that were fetched."""


def prove(tool: Tool, scenario: str, *arguments: str, qemu: str | None = None) -> Outcome:
    chosen = () if qemu is None else ("--qemu", qemu)
    outcome = tool.run("prove", "--json", "-", "--scenario", scenario, *chosen, *arguments)
    assert not tool.leftovers(), "the run's folder was left behind"
    return outcome


@pytest.mark.parametrize("qemu", BUILDS)
@pytest.mark.parametrize("guest", ["bare", "linux"])
def test_what_a_running_destination_changed_is_not_lost(
    tool: Tool, guest: str, qemu: str | None
) -> None:
    outcome = prove(tool, "postcopy-running", "--guest", guest, qemu=qemu)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert report["sensitivity"]["guaranteed_detectable"] >= LEAST_GUARANTEED
    changes = report["changes"]
    assert changes["by_devices"] > 0
    assert changes["by_guest"] <= changes["not_compared"] < report["pages"]
    assert (changes["not_compared"] < 1000) is (guest == "bare"), "it knows what it writes"
    assert f"{changes['not_compared']} pages that the guest may write" in report["unseen"][0]


@pytest.mark.parametrize("scenario", ["postcopy", "postcopy-running", "postcopy-recover"])
def test_lost_dirty_bits_are_found_and_attributed(tool: Tool, scenario: str) -> None:
    outcome = prove(tool, scenario, "--guest", "bare", "--fault", "drop-pages=0.01")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert report["lost"]["device"] == len(report["lost_pages"]) >= 20
    assert {page["link"] for page in report["lost_pages"]} == {"log"}


@pytest.mark.parametrize("qemu", [BUILDS[0], BUILDS[-1]])
def test_a_destination_that_refuses_a_device_in_postcopy_is_reported(
    tool: Tool, qemu: str | None
) -> None:
    arguments = ("--guest", "bare", "--iommu", "intel", "--fault", "iova-as-gpa")
    outcome = prove(tool, "postcopy", *arguments, qemu=qemu)
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert "no page was compared, because the destination refused the device" in report["verdict"]
    assert report["pages"] == 0
    assert report["sensitivity"]["missed_at"].keys() == {"translation"}


@pytest.mark.parametrize("scenario", ["postcopy", "postcopy-running"])
@pytest.mark.parametrize("arguments", [("--ring", "packed"), ("--kill-device",)])
def test_a_device_of_any_form_waits_for_pages(
    tool: Tool, scenario: str, arguments: tuple[str, ...]
) -> None:
    outcome = prove(tool, scenario, "--guest", "bare", *arguments)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
