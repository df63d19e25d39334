"""What ``./dmaproof`` installs, or asks the user to install, before it builds dmaproof."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.arch import ARCHITECTURES, find_architecture
from qmp_tools.host import distribution, launcher
from qmp_tools.host.distribution import recognize

LAUNCHER: Final = Path(__file__).parents[2] / "dmaproof"
MANAGERS: Final = ("apt-get", "dnf", "pacman", "zypper")
HOST: Final = find_architecture("x86_64")
FOREIGN: Final = find_architecture("aarch64")


@dataclass
class Machine:
    """An x86-64 machine on which no program runs; `commands` would have installed packages."""

    programs: set[str] = field(default_factory=set)
    has_static_libc: bool = True
    has_kernel: bool = True
    is_root: bool = True
    exit_code: int = 0
    commands: list[str] = field(default_factory=list)

    def run(self, command: str | list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "cc":
            return subprocess.CompletedProcess(command, 0 if self.has_static_libc else 1)
        if isinstance(command, list):
            raise FileNotFoundError
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.exit_code, "the mirror is away\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A Fedora that has everything for a proof."""
    machine = Machine({"cc", HOST.qemu_program})
    monkeypatch.setattr("subprocess.run", machine.run)
    monkeypatch.setattr("shutil.which", lambda name: name if name in machine.programs else None)
    monkeypatch.setattr("platform.machine", lambda: HOST.name)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if machine.is_root else 1000)
    monkeypatch.setattr(launcher, "_has_kernel", lambda: machine.has_kernel)
    monkeypatch.setattr(launcher, "_APT_LISTS", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    run_on(monkeypatch, "fedora")
    return machine


def run_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = recognize({"NAME": name, "ID": name}, MANAGERS)
    monkeypatch.setattr(distribution, "host_distribution", lambda: found)


@pytest.mark.parametrize("words", ["prove", "doctor", "", "soak --guest=bare --arch x86_64"])
def test_nothing_is_installed_on_a_complete_machine(machine: Machine, words: str) -> None:
    assert launcher.main(words.split()) == 0
    assert not machine.commands


def test_everything_that_is_missing_is_installed_at_once(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Python.h").unlink()
    machine.programs.clear()
    machine.has_static_libc = machine.has_kernel = False
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("sys.version_info", type("Version", (), {"minor": 13})())
    assert launcher.main(["prove"]) == 0
    assert machine.commands == [
        "dnf install -y python3.13 python3.13-devel gcc qemu-system-x86-core glibc-static "
        "kernel-core kernel-modules-core"
    ]


def test_a_user_who_is_not_root_gets_the_command(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.programs.remove("cc")
    machine.is_root = False
    assert launcher.main(["prove"]) == 3
    assert not machine.commands
    message = "dmaproof: packages are missing; run: sudo dnf install -y gcc\n"
    assert capsys.readouterr().err == message


def test_a_failed_installation_shows_its_last_lines(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.programs.remove("cc")
    machine.exit_code = 1
    assert launcher.main(["prove"]) == 3
    errors = capsys.readouterr().err
    assert "the mirror is away\n" in errors
    assert "'dnf install -y gcc' failed with exit code 1" in errors


def test_an_unknown_distribution_gets_the_names_of_the_needs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on(monkeypatch, "alpine")
    machine.programs.clear()
    assert launcher.main(["prove"]) == 3
    assert capsys.readouterr().err == (
        "dmaproof: install with the package manager of alpine: a C compiler (cc); QEMU "
        "(qemu-system-x86_64)\n"
    )


NEEDS: Final = {
    "prove": ["cc", "QEMU", "libc", "kernel"],
    "prove --guest bare": ["cc", "QEMU"],
    "prove --guest=bare --qemu /opt/qemu": ["cc"],
    "prove --kernel vmlinuz": ["cc", "QEMU", "libc"],
    "prove --arch aarch64": ["cc", "foreign QEMU", "cross"],
    "prove --arch=aarch64": ["cc", "foreign QEMU", "cross"],
    "doctor": ["cc"],
    "qemu fetch 11.1": ["cc"],
    "": ["cc"],
    "prove --arch vax": ["cc"],
}
NAMED: Final = {
    "cc": distribution.COMPILER,
    "libc": distribution.STATIC_LIBC,
    "kernel": distribution.KERNEL,
    "QEMU": distribution.qemu(HOST),
    "foreign QEMU": distribution.qemu(FOREIGN),
    "cross": distribution.cross_compiler(FOREIGN),
}


@pytest.mark.parametrize(("words", "names"), NEEDS.items())
def test_a_command_needs_what_its_proof_uses(
    machine: Machine, words: str, names: list[str]
) -> None:
    machine.programs.clear()
    machine.has_static_libc = machine.has_kernel = False
    assert launcher.missing(words.split()) == [NAMED[name] for name in names]


FOR_TESTS: Final = [
    *(distribution.GIT, distribution.QEMU_IMG, distribution.STORAGE_DAEMON, distribution.TCPDUMP),
    distribution.LIBVIRT_HEADERS,
]


@pytest.mark.parametrize("words", ["test", "develop", "test -k ring"])
def test_all_tests_need_qemu_and_a_compiler_for_every_other_architecture(
    machine: Machine, words: str
) -> None:
    others = [arch for arch in ARCHITECTURES.values() if arch.name != HOST.name]
    of_guests = [distribution.qemu, distribution.cross_compiler]
    needs = [*FOR_TESTS, *(need(arch) for arch in others for need in of_guests)]
    needs.append(distribution.KERNEL_TOOLS)
    assert launcher.missing(words.split()) == needs


@pytest.mark.parametrize("words", ["test --fast", "test tests/unit/test_launcher.py"])
def test_some_tests_need_less(machine: Machine, words: str) -> None:
    assert launcher.missing(words.split()) == FOR_TESTS


def test_a_cross_compiler_without_a_libc_stops_no_command(machine: Machine) -> None:
    """Fedora has no package that would add the libc."""
    machine.programs |= {FOREIGN.qemu_program, f"{FOREIGN.gnu}-gcc"}
    machine.has_static_libc = False
    assert launcher.missing(["prove", "--arch", FOREIGN.name]) == []


def test_a_need_without_a_package_stops_no_command(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on(monkeypatch, "suse")
    machine.programs.add(FOREIGN.qemu_program)
    assert launcher.main(["prove", "--arch", FOREIGN.name]) == 0
    assert "no package of suse has a compiler" in capsys.readouterr().err


@pytest.mark.parametrize(("root", "commands"), [(True, ["apt-get update"]), (False, [])])
def test_apt_without_package_lists_fetches_them(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    root: bool,
    commands: list[str],
) -> None:
    run_on(monkeypatch, "debian")
    machine.is_root = root
    assert launcher.main(["prove"]) == 0
    assert machine.commands == commands
    (tmp_path / "mirror_dists_trixie_main_binary-amd64_Packages").touch()
    assert launcher.main(["prove"]) == 0
    assert machine.commands == commands


def test_the_shell_script_installs_python_with_the_managers_own_commands() -> None:
    """The script has these commands itself, because without Python it cannot ask for them."""
    script = LAUNCHER.read_text()
    for family in ("debian", "fedora", "arch", "suse"):
        found = re.search(rf'\*" {family} "\*\)\s+install=\'(.*)\' ;;', script)
        assert found is not None, family
        manager = recognize({"ID": family}, MANAGERS).manager
        assert manager is not None
        install = manager.install.replace("pacman -S", "pacman -Syu")
        prefix = f"{manager.refresh} && {install}" if manager.refresh else install
        assert found[1].startswith(f"{prefix} python")
