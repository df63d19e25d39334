"""A probe finds out whether a QEMU tracks vCPU writes under TCG, in each kind of RAM block."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.arch.architecture import Architecture
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.host.timeout import DEFAULT_TIMEOUT_S
from qmp_tools.proof.probes import vcpu_pages_lost
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.choice import find_qemu, version_of
from support.architectures import require_guests
from support.command import Tool

_MANY = 32
"""Pages of 64. On a busy machine the vCPU is stopped late, after it has rewritten some of them."""


def qemu_of(architecture: Architecture, *, newest: bool) -> Path:
    require_guests(architecture)
    if not newest:
        return find_qemu(None, architecture)
    if not installed(architecture):
        pytest.skip(f"needs a newer QEMU: dmaproof qemu fetch 11.1 --arch {architecture.name}")
    return installed(architecture)[-1].path


@pytest.mark.parametrize("newest", [False, True], ids=["system's", "newest"])
@pytest.mark.parametrize("architecture", [X86_64, AARCH64], ids=lambda each: each.name)
def test_a_probe_counts_the_pages_that_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Architecture, *, newest: bool
) -> None:
    qemu = qemu_of(architecture, newest=newest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no answer is cached there
    lost, lost_in_dimms = (
        asyncio.run(
            vcpu_pages_lost(architecture, qemu, "tcg", DEFAULT_TIMEOUT_S, in_dimms=in_dimms)
        )
        for in_dimms in (False, True)
    )
    version = tuple(int(part) for part in str(version_of(qemu)).split("."))
    assert (lost == 0) if version >= (9,) else (lost >= _MANY)
    if version < (11, 2):  # docs/qemu-findings.md
        assert lost_in_dimms >= _MANY


def test_a_proof_with_dimms_warns_of_losses_in_dimms(tool: Tool) -> None:
    outcome = tool.run("prove", "--guest", "bare", "--scenario", "memory-hotplug", "--accel", "tcg")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    lost = asyncio.run(
        vcpu_pages_lost(X86_64, find_qemu(None), "tcg", DEFAULT_TIMEOUT_S, in_dimms=True)
    )
    assert (f"(a probe lost {lost})" in outcome.errors) is (lost > 0)
