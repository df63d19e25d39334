"""The script that builds the kernel's selftests, and how a program is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qmp_tools.passthrough.ktap_results import read_ktap
from qmp_tools.passthrough.l1.selftests import (
    build_script,
    collect_selftests,
    selftest_files,
    selftest_hardware,
)
from qmp_tools.passthrough.outcome import ProofFailedError
from qmp_tools.passthrough.selftests import judge, run_program, why_missing


def build(source: Path, target: Path, make: str) -> None:
    target.mkdir()
    script = build_script(make, str(source), str(target))
    environment = {"PATH": "/usr/bin:/bin", "JOBS": "1"}
    subprocess.run(["sh", "-ec", script], env=environment, check=True, capture_output=True)


def test_a_source_without_selftests_builds_none_and_says_so(tmp_path: Path) -> None:
    build(tmp_path / "source", tmp_path / "build", "true")
    collect_selftests(tmp_path / "build", tmp_path / "kernel")
    assert "no tools/testing/selftests/vfio" in why_missing(tmp_path / "kernel/vfio", "anything")


def test_a_program_that_does_not_compile_does_not_keep_the_others_from_being_built(
    tmp_path: Path,
) -> None:
    tests = tmp_path / "source/tools/testing/selftests/iommu"
    tests.mkdir(parents=True)
    (tests / "Makefile").write_text(
        "all: $(OUTPUT)/iommufd $(OUTPUT)/iommufd_fail_nth $(OUTPUT)/other\n"
        "$(OUTPUT)/iommufd:\n\techo 'iommufd.c:1: error' >&2; exit 1\n"
        "$(OUTPUT)/%:\n\ttouch $@\n"
    )
    build(tmp_path / "source", tmp_path / "build", "true")
    files = {
        str(file.relative_to(tmp_path / "build")) for file in selftest_files(tmp_path / "build")
    }
    assert files == {
        "selftests/iommu/iommufd_fail_nth",
        "selftests/iommu/log",
        "selftests/vfio/log",
    }
    collect_selftests(tmp_path / "build", tmp_path / "kernel")
    assert "iommufd.c:1: error" in why_missing(tmp_path / "kernel/iommu", "iommufd")


def test_headers_that_cannot_be_made_are_reported_with_the_program(tmp_path: Path) -> None:
    tests = tmp_path / "source/tools/testing/selftests/vfio"
    tests.mkdir(parents=True)
    (tests / "Makefile").write_text("all:\n\tfalse\n")
    build(tmp_path / "source", tmp_path / "build", "false")
    message = why_missing(tmp_path / "build/selftests/vfio", "vfio_pci_device_test")
    assert "making the kernel's headers for user space failed" in message


def test_a_program_that_does_not_end_is_killed_and_named() -> None:
    text = "print('1..2'); print('#  RUN           slow ...', flush=True); time.sleep(60)"
    output, code = run_program([sys.executable, "-c", f"import time; {text}"], 2.0)
    assert code is None
    expected = "the last test: slow; the program did not end within the timeout"
    with pytest.raises(ProofFailedError, match=expected):
        judge(read_ktap(output), code, output)


@pytest.mark.parametrize("knows", [True, False])
def test_l1s_own_qemu_emulates_the_card_if_the_other_does_not(tmp_path: Path, knows: bool) -> None:
    program = tmp_path / "qemu"
    name = "igb" if knows else "e1000e"
    program.write_text(f"#!/bin/sh\necho 'name \"{name}\", bus PCI'\n")
    program.chmod(0o755)
    hardware = selftest_hardware(program, tmp_path / "my root", tmp_path)
    assert (hardware.binary == program) is knows
    if not knows:
        assert f"'{tmp_path}/my root/usr/bin/qemu-system-x86_64'" in hardware.binary.read_text()
