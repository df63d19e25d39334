"""Proofs of the kernel's vhost devices in L1, which is built if it is not in the cache.

The workload is small, because under two layers of TCG each request takes long.
"""

from __future__ import annotations

import pytest

from support.command import Tool

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(3600)]

SMALL = "threads=8,hot=64,write_once=256,churn=128,hold=256,huge_every=0"


def prove(tool: Tool, device: str, *options: str) -> dict[str, object]:
    kernel = "stock" if "stock" in options else "7.3"
    words = [option for option in options if option not in ("stock", "7.3")]
    arguments = ("--device", device, "--l1-kernel", kernel, "--workload", SMALL, "--seed", "7")
    outcome = tool.run("prove", *arguments, "--timeout", "120", *words, "--json", "-")
    assert outcome.exit_code in (0, 1), outcome.errors[-4000:]
    report: dict[str, object] = outcome.report
    assert report["exit_code"] == outcome.exit_code
    return report


def test_vhost_net_passes_and_a_withheld_page_is_caught(tool: Tool) -> None:
    report = prove(tool, "vhost-net", "--control")
    assert (report["exit_code"], report["kernel_log"]) == (0, None)
    control = report["control"]
    assert isinstance(control, dict)
    assert control["caught"]
    assert control["kernel_log"]["logged"] > 256 > control["kernel_log"]["withheld"] > 0
    assert {page["kernel_log"] for page in control["lost_pages"]} == {"withheld"}


@pytest.mark.parametrize("kernel", ["7.3", "stock"])
def test_vhost_net_behind_an_iommu_passes_and_logs_guest_addresses(tool: Tool, kernel: str) -> None:
    report = prove(tool, "vhost-net:recorder", "--iommu", "intel", kernel)
    assert report["exit_code"] == 0
    logged = report["kernel_log"]
    assert isinstance(logged, dict)
    assert logged["logged"] > 256
    assert logged["withheld"] == 0


def test_vhost_scsi_passes(tool: Tool) -> None:
    report = prove(tool, "vhost-scsi:recorder")
    assert report["exit_code"] == 0, report["verdict"]


def test_vhost_scsi_of_linux_6_1_logs_only_its_used_ring(tool: Tool) -> None:
    report = prove(tool, "vhost-scsi:recorder", "stock")
    assert report["exit_code"] == 1
    assert report["kernel_log"] == {"logged": 1, "withheld": 0}
    lost = report["lost_pages"]
    assert isinstance(lost, list)
    assert len(lost) >= 256
    assert {page["kernel_log"] for page in lost} == {"never"}


@pytest.mark.parametrize("kernel", ["7.3", "stock"])
def test_vhost_vsock_logs_only_its_used_rings(tool: Tool, kernel: str) -> None:
    report = prove(tool, "vhost-vsock:recorder", kernel)
    assert report["exit_code"] == 1
    assert report["kernel_log"] == {"logged": 2, "withheld": 0}
    lost = report["lost_pages"]
    assert isinstance(lost, list)
    assert len(lost) >= 256
    assert {page["kernel_log"] for page in lost} == {"never"}
    migrations = report["migrations"]
    assert isinstance(migrations, list)
    assert migrations[0]["requests"] >= 50  # the guest has connected again
