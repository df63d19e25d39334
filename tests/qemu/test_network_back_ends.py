"""Third-party network back ends: DPDK, which sends frames back, and passt, which carries IP."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from support.command import Tool
from support.recipes import (
    BRIEF,
    ROOT,
    assert_passed,
    dpdk,
    newer_qemu,
    newest_qemu,
    on_newer_qemu,
    passt,
    prove,
)

MOST_RING_PAGES = 6
"""A page of descriptors and one of event suppression for each of three queues."""


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_dpdk(tool: Tool, suite: str, ring: str) -> None:
    arguments = on_newer_qemu("dpdk-testpmd", *dpdk(suite))
    outcome = tool.run(*arguments, "--ring", ring, *BRIEF)
    if ring == "packed" and outcome.exit_code == 1:
        # DPDK logs other pages than those of its packed rings (docs/third-party-devices.md).
        lost = outcome.report["lost_pages"]
        assert 0 < len(lost) == outcome.report["lost"]["unknown"] <= MOST_RING_PAGES
        return
    assert_passed(outcome, "net by dpdk-testpmd", certain=False)
    assert outcome.report["setup"]["ring"] == ring


def test_dpdk_behind_an_iommu(tool: Tool) -> None:
    program = dpdk("trixie")
    arguments = on_newer_qemu("dpdk-testpmd", *program, word="iommu-support", qemu=newest_qemu())
    outcome = tool.run(*arguments)
    assert_passed(outcome, "net by dpdk-testpmd", certain=False, least=64)
    assert outcome.report["setup"]["iommu"] == "intel"


@pytest.mark.parametrize("options", [(), ("--kill-device", "--kill-destination-device")])
def test_passt(tool: Tool, options: tuple[str, ...]) -> None:
    outcome = tool.run(*on_newer_qemu("passt", passt()), *BRIEF, *options)
    assert_passed(outcome, "net-udp by passt", certain=False)
    assert tool.leftovers() == []


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (("--ring", "packed"), "without VIRTIO_F_RING_PACKED: the back end or QEMU does not offer"),
        (("--iommu", "intel"), "iommu_platform=true is not supported by the device"),
    ],
)
def test_what_passt_does_not_offer_is_not_tested(
    tool: Tool, options: tuple[str, ...], refusal: str
) -> None:
    outcome = tool.run(*on_newer_qemu("passt", passt()), *options)
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert refusal in outcome.errors


def test_a_network_that_does_not_echo_is_reported_with_both_counts_and_its_log(tool: Tool) -> None:
    program = str(ROOT / "tests" / "back_ends" / "silent.py")
    command = shlex.join([sys.executable, program, "{socket}", "net"])
    qemu = str(newer_qemu().path)
    outcome = prove(tool, "--qemu", qemu, "--device", "net", "--device-command", command)
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert re.search(r"the guest sent \d{5} frames and received 0 of them", outcome.errors)
    assert "the network must send every frame back" in outcome.errors
    assert "device.log:\n    silent" in outcome.errors


def test_a_dpdk_that_takes_frames_and_sends_none(tool: Tool) -> None:
    arguments = on_newer_qemu("dpdk-testpmd", *dpdk("bookworm"))
    at = arguments.index("--device-command") + 1
    arguments[at] += " --forward-mode=rxonly"
    outcome = tool.run(*arguments)
    assert outcome.exit_code == 3, outcome.output + outcome.errors
    assert "and received 0 of them" in outcome.errors
    assert "VHOST_CONFIG: " in outcome.errors  # DPDK's log
