"""A device behind QEMU's VT-d or SMMUv3, whose mappings change while its dirty pages are logged."""

from __future__ import annotations

from typing import Any

import pytest

from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu.builds import installed
from support.architectures import require_guests
from support.command import Tool

FEW_PAGES = ("--workload", "write_once=512", "--accel", "tcg", "--seed", "3")


def prove(tool: Tool, *options: str, iommu: str = "intel") -> dict[str, Any]:
    outcome = tool.run("prove", *FEW_PAGES, *options, "--json", "-", "--quiet")
    assert not tool.leftovers()
    report = outcome.report
    assert report["setup"]["iommu"] == iommu, outcome.output + outcome.errors
    return report


@pytest.mark.parametrize(
    "options",
    [
        ("--guest", "linux", "--device", "blk", "--device", "net"),
        ("--guest", "bare", "--ring", "packed", "--kill-device"),
    ],
)
def test_every_page_survives(tool: Tool, options: tuple[str, ...]) -> None:
    report = prove(tool, "--iommu", "intel", *options)
    assert report["exit_code"] == 0, report["verdict"]
    assert report["sensitivity"]["guaranteed_detectable"] >= 512


def test_a_ring_larger_than_a_page_is_served(tool: Tool) -> None:
    # QEMU 10.0 gives a ring 1,024 entries, and Linux maps its 16 KiB of descriptors page by page.
    qemu = next(
        (str(build.path) for build in installed(X86_64) if build.version.startswith("10.0.")), None
    )
    if qemu is None:
        pytest.skip("needs QEMU 10.0: dmaproof qemu fetch 10.0")
    report = prove(tool, "--iommu", "intel", "--guest", "linux", "--qemu", qemu)
    assert report["exit_code"] == 0, report["verdict"]


@pytest.mark.parametrize(
    ("fault", "guest", "link"),
    [("iova-as-gpa", "linux", "translation"), ("unmap-unharvested", "bare", "tracker")],
)
def test_faults_that_occur_only_behind_an_iommu_are_caught(
    tool: Tool, fault: str, guest: str, link: str
) -> None:
    report = prove(tool, "--fault", fault, "--guest", guest)
    assert report["exit_code"] == 1, report["verdict"]
    lost = [page for page in report["lost_pages"] if page["blame"] == "device"]
    assert len(lost) > 100
    assert {page["link"] for page in lost} == {link}
    assert all(page["iova"] // 4096 != page["gpa"] // 4096 for page in lost)
    assert set(report["sensitivity"]["missed_at"]) == {link}


def test_a_used_ring_that_is_not_logged_is_refused_by_the_destination_and_lost(tool: Tool) -> None:
    report = prove(tool, "--fault", "used-ring-unlogged", "--iommu", "intel", "--guest", "bare")
    assert report["exit_code"] == 1, report["verdict"]
    assert "last_avail_idx" in report["refusal"]
    assert {page["kind"] for page in report["lost_pages"]} <= {"used ring"}
    assert report["sensitivity"]["unreported"]


def test_an_smmuv3_reports_every_removed_mapping(tool: Tool) -> None:
    require_guests(AARCH64)
    arguments = ("--arch", "aarch64", "--guest", "bare")
    clean = prove(tool, *arguments, "--iommu", "smmuv3", iommu="smmuv3")
    assert clean["exit_code"] == 0, clean["verdict"]
    assert clean["sensitivity"]["guaranteed_detectable"] >= 512
    faulty = prove(tool, *arguments, "--fault", "unmap-unharvested", iommu="smmuv3")
    assert faulty["exit_code"] == 1, faulty["verdict"]
    lost = [page for page in faulty["lost_pages"] if page["blame"] == "device"]
    assert len(lost) > 100
    assert {page["link"] for page in lost} == {"tracker"}
