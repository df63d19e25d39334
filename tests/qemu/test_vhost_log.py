"""The dirty logs of the kernel's vhost devices, in L1."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from qmp_tools.findings.linux import LINUX_FINDINGS
from support.command import Tool

pytestmark = pytest.mark.timeout(3600)

PATCHES: Final = Path(__file__).parents[2] / "docs" / "upstream" / "linux"


def outcomes(tool: Tool, *options: str) -> dict[str, dict[str, Any]]:
    words = ("passthrough", "--only", "vhost-log", "--quick", "--json", "-", "--seed", "1")
    outcome = tool.run(*words, *options)
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    return {row["name"]: row for row in outcome.report["outcomes"]}


def test_every_page_is_logged_but_those_of_the_known_findings(tool: Tool) -> None:
    rows = outcomes(tool)
    assert {row["state"] for row in rows.values()} == {"holds"}
    figures = {name: row["figures"] for name, row in rows.items()}
    for name, found in figures.items():
        if "random" in name or name.endswith(("reads", "a reset", "events")):
            assert found["lost"] == 0, name
            assert found["pages"] > 0, name
        if "control" in name:
            assert 0 < found["lost"] < found["changed"], name
        if "not logged" in name:
            assert found["lost"] > 0, name
    assert figures["net: IOTLB, the used ring is logged up to a page border only"]["lost"] == 1
    assert figures["net: in order, pages after the used ring are logged"]["beyond"] > 0


def test_linux_6_1_has_neither_buffers_in_order_nor_a_log_of_scsi_data(tool: Tool) -> None:
    rows = outcomes(tool, "--kernel", "stock")
    unsupported = {name: row["found"] for name, row in rows.items() if row["state"] == "lacking"}
    assert unsupported.keys() == {
        name for name in rows if "in order" in name or name.startswith("scsi: ")
    }
    for name, found in unsupported.items():
        reason = "logs no buffer" if name.startswith("scsi: ") else "does not offer IN_ORDER"
        assert reason in found
    assert {row["state"] for name, row in rows.items() if name not in unsupported} == {"holds"}
    assert rows["vsock: received buffers are not logged"]["figures"]["lost"] > 0


def test_with_the_patches_for_upstream_only_the_findings_differ(tool: Tool) -> None:
    """The first run builds the kernel without and with the patches, which takes minutes."""
    patches = [str(patch) for patch in sorted(PATCHES.glob("*.patch"))]
    rows = outcomes(tool, "--kernel-patch", *patches)
    findings = {name for finding in LINUX_FINDINGS for name in finding.proofs}
    corrected = {name for name in rows if f"vhost-log: {name}" in findings}
    assert len(corrected) == 8
    assert {name for name, row in rows.items() if row["corrected"]} == corrected
    assert {row["state"] for name, row in rows.items() if name not in corrected} == {"holds"}
