"""Proofs of guests of RISC-V and s390x, under TCG, with QEMUs of Debian 13 or later.

With the QEMU of Debian 12, a migrated RISC-V guest and the transmit queue of a
migrated s390x guest stop.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from qmp_tools.arch.architecture import Architecture
from qmp_tools.arch.riscv64 import RISCV64
from qmp_tools.arch.s390x import S390X
from qmp_tools.qemu.builds import installed
from support.command import TIMEOUT_S, Outcome, Tool


def _newest_qemu(architecture: Architecture) -> str:
    builds = installed(architecture)
    if not builds:
        pytest.skip(f"needs a newer QEMU: dmaproof qemu fetch 11.1 --arch {architecture.name}")
    return str(builds[-1].path)


def _prove(tool: Tool, architecture: Architecture, *options: str) -> Outcome:
    if shutil.which(architecture.cross_compiler) is None:
        pytest.skip(
            f"needs a cross compiler: apt-get install {architecture.cross_packages['debian']}"
        )
    qemu = ("--arch", architecture.name, "--qemu", _newest_qemu(architecture))
    return tool.run("prove", *qemu, *options, "--json", "-")


def _passes(report: dict[str, Any]) -> None:
    assert report["exit_code"] == 0, report["verdict"]
    assert report["guest"]["errors"] == 0
    assert report["guest"]["rechecked"] > 4096


def test_every_page_survives_on_riscv64(tool: Tool) -> None:
    report = _prove(tool, RISCV64, "--ring", "packed").report
    _passes(report)
    assert report["sensitivity"]["guaranteed_detectable"] >= 512


def test_a_fault_is_caught_on_riscv64(tool: Tool) -> None:
    report = _prove(tool, RISCV64, "--fault", "drop-pages").report
    assert report["exit_code"] == 1, report["verdict"]
    assert {page["link"] for page in report["lost_pages"]} == {"log"}


def test_every_page_survives_on_s390x(tool: Tool) -> None:
    report = _prove(tool, S390X, "--device", "echo").report
    _passes(report)
    assert report["sensitivity"]["rewritten"] > 100


def test_a_fault_is_caught_on_s390x(tool: Tool) -> None:
    report = _prove(tool, S390X, "--device", "echo", "--fault", "drop-pages=0.1").report
    assert report["exit_code"] == 1, report["verdict"]
    assert report["sensitivity"]["missed_at"].keys() == {"log"}


def test_a_big_endian_guest_checks_the_stamps_of_a_disk(tool: Tool) -> None:
    report = _prove(tool, S390X, "--device", "qemu:virtio-blk-pci").report
    _passes(report)
    assert report["sensitivity"]["guaranteed_detectable"] >= 512


def test_qemu_has_no_vhost_user_disk_for_s390x() -> None:
    command = [_newest_qemu(S390X), "-display", "none", "-device", "vhost-user-blk-ccw"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "'vhost-user-blk-ccw' is not a valid device model name" in done.stderr
