"""The doctor's findings about machines on which prerequisites are missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmp_tools.cli import doctor as command
from qmp_tools.cli import main as cli
from qmp_tools.doctor import GUEST_MEMORY_BYTES, Facts, can_prove, examine
from qmp_tools.host.finding import Finding, State
from qmp_tools.qemu.machine import MIB
from support.command import Outcome

COMPLETE = Facts(
    root=True,
    apt=True,
    python=(3, 11),
    qemu="11.1.3 (/usr/bin/qemu-system-x86_64)",
    qemu_error=None,
    fetched=["11.1.3"],
    archive_error=None,
    compiler="static",
    kernel="cached",
    missing_formats={},
    kvm="usable",
    kvm_group="kvm",
    virtualization="vmx",
    memory_available=8 << 30,
    memfd_error=None,
    temporary_error=None,
    cache_error=None,
    extras={"bench": []},
)


def finding_of(facts: Facts, name: str, guest: str = "linux") -> Finding:
    (found,) = [each for each in examine(facts, guest) if each.name == name]
    return found


@pytest.mark.parametrize("guest", GUEST_MEMORY_BYTES)
def test_a_machine_with_all_prerequisites_can_prove(guest: str) -> None:
    findings = examine(COMPLETE, guest)
    assert {finding.state for finding in findings} == {State.OK}
    assert all(finding.remedy is None for finding in findings)
    assert can_prove(findings)


INSTALL = "apt-get install -y --no-install-recommends"
NO_PROOF = {
    "a broken QEMU": (
        {"qemu": None, "qemu_error": "libfdt.so.1 is missing"},
        "QEMU",
        f"{INSTALL} --reinstall qemu-system-x86",
    ),
    "no QEMU": (
        {"qemu": None},
        "QEMU",
        f"apt-get update && {INSTALL} qemu-system-x86",
    ),
    "no QEMU, not root": (
        {"qemu": None, "root": False},
        "QEMU",
        f"sudo apt-get update && sudo {INSTALL} qemu-system-x86",
    ),
    "no QEMU, no apt": ({"qemu": None, "apt": False}, "QEMU", "your distribution's own tool"),
    "old Python": ({"python": (3, 10)}, "Python", f"{INSTALL} python3.11 python3.11-venv"),
    "no compiler": ({"compiler": None}, "C compiler", f"{INSTALL} gcc libc6-dev"),
    "no static libc": ({"compiler": "dynamic"}, "C compiler", f"{INSTALL} gcc libc6-dev"),
    "apt without lists": ({"kernel": "apt has no lists"}, "guest's kernel", "apt-get update"),
    "no apt": ({"kernel": "no apt", "apt": False}, "guest's kernel", "prove --guest bare"),
    "no zstd": (
        {"kernel": "available", "missing_formats": {"zstd": "backports.zstd"}},
        "guest's kernel",
        "-m pip install backports-zstd",
    ),
    "a Python without lzma": (
        {"kernel": "available", "missing_formats": {"xz": "lzma"}},
        "guest's kernel",
        "a Python that has its whole standard library",
    ),
    "little memory": ({"memory_available": 700 * MIB}, "memory", "prove --guest bare"),
    "no memfd": ({"memfd_error": "Operation not permitted"}, "shared memory", "memfd_create"),
    "long TMPDIR": (
        {"temporary_error": "too long for Unix sockets"},
        "temporary folder",
        "TMPDIR=/tmp",
    ),
    "no cache": ({"cache_error": "cannot be written to"}, "cache folder", "XDG_CACHE_HOME="),
}


@pytest.mark.parametrize(("differences", "name", "remedy"), NO_PROOF.values(), ids=NO_PROOF)
def test_a_missing_requirement_makes_proofs_impossible(
    differences: dict[str, object], name: str, remedy: str
) -> None:
    facts = replace(COMPLETE, **differences)  # type: ignore[arg-type]
    found = finding_of(facts, name)
    assert found.state == State.MISSING
    assert remedy in (found.remedy or "")
    assert not can_prove(examine(facts, "linux"))


NOT_NEEDED = {
    "no KVM": ({"kvm": "absent"}, "KVM", "modprobe kvm_intel"),
    "no KVM, AMD": ({"kvm": "absent", "virtualization": "svm"}, "KVM", "modprobe kvm_amd"),
    "no nesting": ({"kvm": "absent", "virtualization": None}, "KVM", "in the hypervisor"),
    "group": ({"kvm": "forbidden", "root": False}, "KVM", "sudo usermod -aG kvm $USER"),
    "root's": ({"kvm": "forbidden", "kvm_group": "root"}, "KVM", "chmod a+rw /dev/kvm"),
    "in a container": ({"kvm": "withheld"}, "KVM", "--device /dev/kvm"),
    "one QEMU": ({"fetched": []}, "fetched QEMUs", "dmaproof qemu fetch 11.1"),
    "one QEMU, apt without lists": (
        {"fetched": [], "archive_error": "apt knows no archive"},
        "fetched QEMUs",
        "apt-get update && dmaproof qemu fetch 11.1",
    ),
    "one QEMU, no apt": ({"fetched": [], "apt": False}, "fetched QEMUs", "needs Debian's apt"),
    "no extra": (
        {"extras": {"bench": ["matplotlib"]}},
        "extra 'bench'",
        "pip install 'dmaproof[bench]'",
    ),
}


@pytest.mark.parametrize(("differences", "name", "remedy"), NOT_NEEDED.values(), ids=NOT_NEEDED)
def test_a_limitation_leaves_proofs_possible(
    differences: dict[str, object], name: str, remedy: str
) -> None:
    facts = replace(COMPLETE, **differences)  # type: ignore[arg-type]
    found = finding_of(facts, name)
    assert found.state == State.LIMITED
    assert remedy in (found.remedy or "")
    assert can_prove(examine(facts, "linux"))


def test_the_bare_guest_needs_less() -> None:
    facts = replace(COMPLETE, compiler="dynamic", kernel="no apt", memory_available=700 * MIB)
    assert can_prove(examine(facts, "bare"))
    assert not can_prove(examine(replace(facts, compiler=None), "bare"))
    assert not can_prove(examine(replace(facts, memory_available=500 * MIB), "bare"))


@pytest.mark.parametrize(("facts", "exit_code"), [(COMPLETE, 0), (replace(COMPLETE, qemu=None), 3)])
def test_the_command_prints_its_findings_and_exits_with_3_if_one_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    facts: Facts,
    exit_code: int,
) -> None:
    monkeypatch.setattr(command, "gather_facts", lambda: facts)
    assert cli.main(["doctor"]) == exit_code
    text = capsys.readouterr().out
    assert ("MISSING  QEMU" in text) == (exit_code == 3)
    assert ("→ apt-get update" in text) == (exit_code == 3)
    assert cli.main(["doctor", "--json", "-"]) == exit_code
    report = Outcome(exit_code, capsys.readouterr().out, "").report
    assert report["exit_code"] == exit_code
    states = {found["name"]: found["state"] for found in report["findings"]}
    assert states["QEMU"] == ("ok" if exit_code == 0 else "missing")


def test_a_cached_kernel_needs_no_decompression() -> None:
    assert can_prove(
        examine(replace(COMPLETE, missing_formats={"zstd": "backports.zstd"}), "linux")
    )
