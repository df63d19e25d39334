"""The doctor's findings about machines on which prerequisites are missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmp_tools.arch import find_architecture
from qmp_tools.arch.architecture import Architecture
from qmp_tools.cli import doctor as command
from qmp_tools.cli import main as cli
from qmp_tools.doctor import GUEST_MEMORY_BYTES, Facts, can_prove, examine
from qmp_tools.host.distribution import Distribution, recognize
from qmp_tools.host.finding import Finding, State
from qmp_tools.qemu.machine import MIB
from support.command import Outcome

MANAGERS = ("apt-get", "dnf", "pacman", "zypper")


def called(name: str) -> Distribution:
    return recognize({"NAME": name, "ID": name}, MANAGERS)


COMPLETE = Facts(
    root=True,
    distribution=called("debian"),
    architecture=find_architecture("x86_64"),
    native=True,
    python=(3, 11),
    qemu="11.1.3 (/usr/bin/qemu-system-x86_64)",
    qemu_error=None,
    fetched=["11.1.3"],
    archive_error=None,
    compiler="static",
    kernel="/boot/vmlinuz",
    kernel_error=None,
    kernel_cached=False,
    missing_formats={},
    kvm="usable",
    kvm_group="kvm",
    kvm_module="kvm_intel",
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
    "no QEMU, unknown distribution": (
        {"qemu": None, "distribution": called("alpine")},
        "QEMU",
        "install with the package manager of alpine: QEMU (qemu-system-x86_64)",
    ),
    "old Python": ({"python": (3, 10)}, "Python", f"{INSTALL} python3.11 python3.11-venv"),
    "no compiler": ({"compiler": None}, "C compiler", f"{INSTALL} gcc libc6-dev"),
    "no static libc": ({"compiler": "freestanding"}, "C compiler", f"{INSTALL} gcc libc6-dev"),
    "apt without lists": (
        {"kernel": None, "kernel_error": "apt has no lists"},
        "guest's kernel",
        "apt-get update, or dmaproof prove --guest bare",
    ),
    "no zstd": (
        {"missing_formats": {"zstd": "backports.zstd"}},
        "guest's kernel",
        "-m pip install backports-zstd",
    ),
    "no zstd for the host's own kernel": (
        {
            "kernel": None,
            "kernel_error": "the modules are compressed with zstd",
            "missing_formats": {"zstd": "backports.zstd"},
        },
        "guest's kernel",
        "-m pip install backports-zstd",
    ),
    "a Python without lzma": (
        {"missing_formats": {"xz": "lzma"}},
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
    "no nesting": ({"kvm": "absent", "kvm_module": None}, "KVM", "in the hypervisor"),
    "no KVM, arm64": (
        {"kvm": "absent", "kvm_module": None, "architecture": find_architecture("aarch64")},
        "KVM",
        "EL2",
    ),
    "group": ({"kvm": "forbidden", "root": False}, "KVM", "sudo usermod -aG kvm $USER"),
    "root's": ({"kvm": "forbidden", "kvm_group": "root"}, "KVM", "chmod a+rw /dev/kvm"),
    "in a container": ({"kvm": "withheld"}, "KVM", "--device /dev/kvm"),
    "one QEMU": ({"fetched": []}, "fetched QEMUs", "dmaproof qemu fetch 11.1"),
    "one QEMU, apt without lists": (
        {"fetched": [], "archive_error": "apt knows no archive"},
        "fetched QEMUs",
        "apt-get update && dmaproof qemu fetch 11.1",
    ),
    "one QEMU, no apt": (
        {"fetched": [], "distribution": called("fedora")},
        "fetched QEMUs",
        "use --qemu PATH",
    ),
    "one QEMU, arm64 guest": (
        {"fetched": [], "architecture": find_architecture("aarch64"), "native": False},
        "fetched QEMUs",
        "dmaproof qemu fetch 11.1 --arch aarch64",
    ),
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
    facts = replace(COMPLETE, compiler="freestanding", kernel=None, memory_available=700 * MIB)
    assert can_prove(examine(facts, "bare"))
    assert not can_prove(examine(replace(facts, compiler=None), "bare"))
    assert not can_prove(examine(replace(facts, memory_available=500 * MIB), "bare"))


REMEDIES = {
    "fedora": {
        "QEMU": "dnf install -y qemu-system-x86-core",
        "C compiler": "dnf install -y gcc glibc-static",
        "guest's kernel": "dnf install -y kernel-core kernel-modules-core",
        "Python": "dnf install -y python3.11",
    },
    "arch": {
        "QEMU": "pacman -S --noconfirm --needed qemu-system-x86",
        "C compiler": "pacman -S --noconfirm --needed gcc glibc",
        "guest's kernel": "pacman -S --noconfirm --needed linux",
        "Python": "pacman -S --noconfirm --needed python",
    },
    "suse": {
        "QEMU": "zypper install -y --no-recommends qemu-x86",
        "C compiler": "zypper install -y --no-recommends gcc glibc-devel glibc-devel-static",
        "guest's kernel": "zypper install -y --no-recommends kernel-default",
        "Python": "zypper install -y --no-recommends python311",
    },
    "debian": {
        "QEMU": f"apt-get update && {INSTALL} qemu-system-x86",
        "C compiler": f"apt-get update && {INSTALL} gcc libc6-dev",
        "guest's kernel": "apt-get update, or dmaproof prove --guest bare",
        "Python": f"apt-get update && {INSTALL} python3.11 python3.11-venv",
    },
}


@pytest.mark.parametrize("family", REMEDIES)
def test_the_remedies_are_the_commands_of_the_distribution(family: str) -> None:
    nothing = replace(
        COMPLETE,
        distribution=called(family),
        python=(3, 10),
        qemu=None,
        compiler=None,
        kernel=None,
    )
    missing = {
        found.name: found.remedy
        for found in examine(nothing, "linux")
        if found.state == State.MISSING
    }
    assert missing == REMEDIES[family]


CROSS_REMEDIES = {
    "debian": f"apt-get update && {INSTALL} gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "fedora": "dnf install -y gcc-aarch64-linux-gnu",
    "arch": "pacman -S --noconfirm --needed aarch64-linux-gnu-gcc",
    "suse": "no package of suse has a compiler of static programs for another architecture "
    "(aarch64-linux-gnu-gcc)",
}


@pytest.mark.parametrize("family", CROSS_REMEDIES)
def test_a_guest_of_another_architecture_needs_its_qemu_and_compiler(family: str) -> None:
    facts = replace(
        COMPLETE,
        distribution=called(family),
        architecture=find_architecture("aarch64"),
        native=False,
        qemu=None,
        compiler=None,
    )
    assert "qemu-system-aarch64 was not found" in finding_of(facts, "QEMU").what
    assert "aarch64-linux-gnu-gcc was not found" in finding_of(facts, "C compiler").what
    assert finding_of(facts, "C compiler").remedy == CROSS_REMEDIES[family]
    assert finding_of(facts, "KVM").state == State.LIMITED
    assert "aarch64 uses TCG" in finding_of(facts, "KVM").what


def test_a_cross_compiler_without_a_libc_is_enough_for_the_bare_guest() -> None:
    """As in Fedora, whose cross compilers are for kernels."""
    arch = find_architecture("aarch64")
    facts = replace(COMPLETE, architecture=arch, native=False, compiler="freestanding")
    assert "libc6-dev-arm64-cross" in (finding_of(facts, "C compiler").remedy or "")
    fedora = replace(facts, distribution=called("fedora"))
    remedy = "dmaproof prove --guest bare --arch aarch64"
    assert finding_of(fedora, "C compiler").remedy == remedy
    assert finding_of(fedora, "C compiler", "bare").state == State.LIMITED


def test_a_guest_of_another_architecture_needs_a_kernel_that_the_machine_may_not_have() -> None:
    arch = find_architecture("aarch64")
    facts = replace(COMPLETE, architecture=arch, native=False, kernel=None)
    remedy = finding_of(facts, "guest's kernel").remedy
    assert remedy == "--kernel FILE --modules FOLDER, with a kernel for aarch64"


@pytest.mark.parametrize(("facts", "exit_code"), [(COMPLETE, 0), (replace(COMPLETE, qemu=None), 3)])
def test_the_command_prints_its_findings_and_exits_with_3_if_one_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    facts: Facts,
    exit_code: int,
) -> None:
    monkeypatch.setattr(command, "gather_facts", lambda _: facts)
    assert cli.main(["doctor"]) == exit_code
    text = capsys.readouterr().out
    assert ("MISSING  QEMU" in text) == (exit_code == 3)
    assert ("→ apt-get update" in text) == (exit_code == 3)
    assert cli.main(["doctor", "--json", "-"]) == exit_code
    report = Outcome(exit_code, capsys.readouterr().out, "").report
    assert report["exit_code"] == exit_code
    states = {found["name"]: found["state"] for found in report["findings"]}
    assert states["QEMU"] == ("ok" if exit_code == 0 else "missing")


@pytest.mark.parametrize("arguments", [[], ["--guest", "bare", "--arch", "aarch64"]])
def test_the_command_examines_the_chosen_proof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def facts_for(architecture: Architecture) -> Facts:
        return replace(COMPLETE, architecture=architecture, native=False)

    monkeypatch.setattr(command, "gather_facts", facts_for)
    assert cli.main(["doctor", *arguments]) == 0
    proof = " ".join(arguments or ["--guest", "linux"])
    assert f"a proof can run: dmaproof prove {proof}\n" in capsys.readouterr().out


def test_a_cached_kernel_needs_no_decompression() -> None:
    facts = replace(COMPLETE, missing_formats={"zstd": "backports.zstd"}, kernel_cached=True)
    assert can_prove(examine(facts, "linux"))
