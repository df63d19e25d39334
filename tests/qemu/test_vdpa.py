"""Proofs of vDPA devices, in L1 unless this machine has such devices."""

from __future__ import annotations

import contextlib

import pytest

from dmaproof.errors import UsageError
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu.builds import build_folder
from support.command import Outcome, Tool

pytestmark = pytest.mark.timeout(3600)

QEMU = "10.0"
"""QEMU 11.1 does not drive the devices correctly (docs/qemu-findings.md)."""
SMALL = "threads=4,hot=64,write_once=128,churn=512,hold=256,huge_every=0"
"""L2 is slow under two layers of TCG."""


def prove(tool: Tool, device: str, *arguments: str) -> Outcome:
    with contextlib.suppress(UsageError):
        build_folder(QEMU, X86_64)
        options = ("--qemu", QEMU, "--workload", SMALL, "--timeout", "150", "--seed", "1")
        return tool.run("prove", "--device", device, "--json", "-", *options, *arguments)
    pytest.skip(f"no QEMU {QEMU} here; fetch it with 'dmaproof qemu fetch {QEMU}'")


def test_a_network_card_in_user_space_passes(tool: Tool) -> None:
    outcome = prove(tool, "vduse-net")
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    assert outcome.report["sensitivity"]["rewritten"] >= 128
    assert outcome.report["sensitivity"]["unreported"] == 0


def test_a_length_that_is_too_short_fails_the_proof(tool: Tool) -> None:
    outcome = prove(tool, "vduse-net", "--fault", "drop-pages=0.05")
    assert outcome.exit_code == 1, outcome.errors[-4000:]
    sensitivity = outcome.report["sensitivity"]
    assert 0 < sensitivity["unreported"] == sensitivity["missed_at"]["log"]


def test_the_simulated_network_card_passes(tool: Tool) -> None:
    outcome = prove(tool, "vdpa-net")
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    assert outcome.report["sensitivity"]["guaranteed_detectable"] > 0
