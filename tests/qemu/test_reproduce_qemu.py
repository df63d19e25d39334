"""The findings in QEMU that are cheap to try, on each version that is available.

The proofs of the others are in test_third_party, test_scenarios, test_iommu and test_passthrough.
"""

from __future__ import annotations

from typing import Final

import pytest

from dmaproof.errors import UsageError
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu.choice import find_qemu, version_of
from support.command import Tool

AFFECTED: Final = {
    "virtio-ring-1024": ["10.0.13"],
    "virtio-status-abort": ["11.1.3"],
    "vhost-user-scsi-change": ["7.2.22", "10.0.13", "11.1.3"],
    "vhost-user-gpu-state": ["10.0.13", "11.1.3"],
    "tcg-later-blocks": ["7.2.22", "10.0.13", "11.1.3"],
    "vhost-log-shared-word": ["7.2.22", "10.0.13", "11.1.3"],
}
"""The tested versions that have each defect."""
TESTED: Final = ("7.2.22", "10.0.13", "11.1.3")


@pytest.mark.parametrize("version", TESTED)
@pytest.mark.parametrize("name", AFFECTED)
def test_the_affected_versions_have_the_defect_and_no_other(
    tool: Tool, name: str, version: str
) -> None:
    try:
        qemu = find_qemu(version, X86_64)
    except UsageError as error:
        pytest.skip(str(error))
    if name == "vhost-user-gpu-state" and version == "7.2.22":
        pytest.skip("QEMU 7.2 needs KVM for vhost-user-gpu")
    assert version_of(qemu) == version
    outcome = tool.run("reproduce", name, "--qemu", str(qemu), "--json", "-")
    affected = version in AFFECTED[name]
    assert outcome.exit_code == affected, outcome.output + outcome.errors[-4000:]
    (finding,) = outcome.report["findings"]
    assert finding["state"] == ("reproduced" if affected else "not-reproduced")
    assert finding["tested"].startswith(f"QEMU {version} ")
    assert tool.leftovers() == []
