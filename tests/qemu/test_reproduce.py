"""The findings in Linux on real kernels, each kernel booted once."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from qmp_tools.findings.linux import LINUX_FINDINGS
from support.command import Tool

pytestmark = pytest.mark.timeout(3600)

PATCHES: Final = Path(__file__).parents[2] / "docs" / "upstream" / "linux"


def states_of(tool: Tool, exit_code: int, *arguments: str) -> dict[str, str]:
    """Return the state of each finding that was tried, by its name."""
    outcome = tool.run("reproduce", *arguments, "--json", "-")
    assert outcome.exit_code == exit_code, outcome.output + outcome.errors[-4000:]
    assert tool.leftovers() == []
    return {finding["name"]: finding["state"] for finding in outcome.report["findings"]}


def test_the_default_kernel_has_every_defect(tool: Tool) -> None:
    names = [finding.name for finding in LINUX_FINDINGS]
    assert states_of(tool, 1, *names) == dict.fromkeys(names, "reproduced")


def test_the_stock_kernel_has_the_defects_that_are_documented(tool: Tool) -> None:
    names = [finding.name for finding in LINUX_FINDINGS]
    assert states_of(tool, 1, *names, "--kernel", "stock") == {
        "iova-bitmap-early-range": "reproduced",
        "iova-bitmap-overrun": "reproduced",
        "hwpt-hole": "untested",  # this kernel has no iommufd
        "iova-bitmap-lost-fault": "not-reproduced",
        "hwpt-odd-page-size": "untested",
        "vhost-iotlb-used-ring": "reproduced",
        "vhost-in-order-used-ring": "untested",  # this kernel does not have the feature
        "vhost-vsock-buffers": "reproduced",
        "vhost-net-discarded-frame": "reproduced",
        "vhost-scsi-in-flight": "untested",  # vhost-scsi of this kernel logs no buffer at all
    }


def test_no_defect_is_left_with_the_patches_for_upstream(tool: Tool) -> None:
    """The first run builds the kernel without and with the patches, which takes minutes."""
    names = [finding.name for finding in LINUX_FINDINGS]
    patches = [str(patch) for patch in sorted(PATCHES.glob("*.patch"))]
    assert states_of(tool, 0, *names, "--kernel-patch", *patches) == dict.fromkeys(
        names, "not-reproduced"
    )
