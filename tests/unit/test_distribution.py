"""The package managers of distributions, and what packages are called there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.arch import ARCHITECTURES, find_architecture
from qmp_tools.host import distribution
from qmp_tools.host.distribution import Distribution, Need, recognize

FAMILIES: Final = ("debian", "fedora", "arch", "suse")
MANAGERS: Final = ("apt-get", "dnf", "pacman", "zypper")

RECOGNIZED: Final = {
    "Debian": ({"ID": "debian"}, "apt-get"),
    "Ubuntu": ({"ID": "ubuntu", "ID_LIKE": "debian"}, "apt-get"),
    "Linux Mint": ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "apt-get"),
    "Fedora": ({"ID": "fedora"}, "dnf"),
    "Arch Linux": ({"ID": "arch"}, "pacman"),
    "Arch Linux ARM": ({"ID": "archarm", "ID_LIKE": "arch"}, "pacman"),
    "openSUSE Tumbleweed": ({"ID": "opensuse-tumbleweed", "ID_LIKE": "opensuse suse"}, "zypper"),
    "openSUSE Leap": ({"ID": "opensuse-leap", "ID_LIKE": "suse opensuse"}, "zypper"),
    "RHEL": ({"ID": "rhel", "ID_LIKE": "fedora"}, None),
    "Rocky Linux": ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, None),
    "Alpine": ({"ID": "alpine"}, None),
    "ALT Linux, whose apt-get has other packages": ({"ID": "altlinux"}, None),
    "no os-release": ({}, None),
}


@pytest.mark.parametrize(("os_release", "program"), RECOGNIZED.values(), ids=RECOGNIZED)
def test_a_distribution_is_recognized_by_its_own_name_and_what_it_is_like(
    os_release: dict[str, str], program: str | None
) -> None:
    """Other package managers are installed too, as Debian has a package of dnf and of zypper."""
    found = recognize(os_release, MANAGERS)
    assert (found.manager.program if found.manager else None) == program


def test_a_distribution_without_its_package_manager_is_unknown() -> None:
    """An image-based Fedora, for instance, has no dnf."""
    assert recognize({"ID": "fedora"}, ["apt-get"]).manager is None


def distribution_of(family: str) -> Distribution:
    found = recognize({"PRETTY_NAME": f"{family} 1", "ID": family}, MANAGERS)
    assert found.manager is not None
    return found


COMMANDS: Final = {
    "debian": "apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev",
    "fedora": "dnf install -y gcc glibc-static",
    "arch": "pacman -S --noconfirm --needed gcc glibc",
    "suse": "zypper install -y --no-recommends gcc glibc-devel glibc-devel-static",
}
TOOLS: Final = (distribution.COMPILER, distribution.STATIC_LIBC)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_installs_the_familys_packages_each_once(family: str) -> None:
    host = distribution_of(family)
    assert host.command(*TOOLS, root=True) == COMMANDS[family]
    sudo = " && ".join(f"sudo {command}" for command in COMMANDS[family].split(" && "))
    assert host.command(*TOOLS, root=False) == sudo
    assert host.how_to_install(*TOOLS, root=False) == f"run '{sudo}'"


@pytest.mark.parametrize(
    ("family", "option"),
    [("debian", "--reinstall"), ("fedora", "reinstall"), ("suse", "--force"), ("arch", "-S")],
)
def test_a_damaged_package_is_installed_again(family: str, option: str) -> None:
    command = distribution_of(family).command(distribution.GIT, root=True, again=True)
    assert command is not None
    assert option in command.split()
    assert "--needed" not in command


def test_an_unknown_distribution_names_the_needs() -> None:
    unknown = recognize({"NAME": "Alpine Linux", "ID": "alpine"}, [])
    assert unknown.command(*TOOLS, root=True) is None
    assert unknown.how_to_install(*TOOLS, root=True) == (
        "install with the package manager of Alpine Linux: a C compiler (cc); a C library that can "
        "be linked statically"
    )


def test_a_need_without_a_package_is_named() -> None:
    cross = distribution.cross_compiler(find_architecture("aarch64"))
    suse = distribution_of("suse")
    assert suse.command(cross, root=True) is None
    assert suse.how_to_install(cross, distribution.GIT, root=True) == (
        "run 'zypper install -y --no-recommends git-core'; no package of suse 1 has a compiler of "
        "static programs for another architecture (aarch64-linux-gnu-gcc)"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_has_qemu_for_every_architecture(name: str) -> None:
    assert set(distribution.qemu(ARCHITECTURES[name]).packages) == set(FAMILIES)


def test_apt_chooses_the_package_that_has_qemu_in_its_release() -> None:
    """riscv64's is qemu-system-misc in Debian 12, and qemu-system-riscv later."""
    packages = distribution_of("debian").packages(distribution.qemu(find_architecture("riscv64")))
    assert packages == ["qemu-system-riscv64"]


def test_every_family_has_what_dmaproof_is_built_and_tested_with() -> None:
    constants = [each for each in vars(distribution).values() if isinstance(each, Need)]
    assert distribution.KERNEL in constants
    for need in (*constants, distribution.python(11), distribution.python_headers(11)):
        assert set(need.packages) == set(FAMILIES), need.what


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Distribution]:
    """Return the distribution of a machine with this os-release and this package manager."""

    def found(os_release: str, program: str) -> Distribution:
        file = tmp_path / "os-release"
        file.write_text(os_release)
        monkeypatch.setattr(distribution, "_OS_RELEASE", (tmp_path / "missing", file))
        monkeypatch.setattr(distribution, "_PACMAN_DATABASES", tmp_path / "sync")
        monkeypatch.setattr("shutil.which", lambda name: name if name == program else None)
        return distribution.host_distribution()

    return found


def test_the_hosts_os_release_is_read(host: Callable[[str, str], Distribution]) -> None:
    found = host(
        "# a comment\nPRETTY_NAME=\"Fedora Linux 43\"\nID='fedora'\nVERSION_ID=43\n", "dnf"
    )
    assert found.name == "Fedora Linux 43"
    assert found.manager is not None
    assert found.manager.program == "dnf"


def test_pacman_without_databases_updates_the_system(
    host: Callable[[str, str], Distribution], tmp_path: Path
) -> None:
    """As in a container; Arch Linux supports no installation from newer databases alone."""
    without = host("ID=arch\n", "pacman").command(distribution.GIT, root=True)
    assert without == "pacman -Syu --noconfirm --needed git"
    (tmp_path / "sync").mkdir()
    (tmp_path / "sync" / "core.db").touch()
    assert host("ID=arch\n", "pacman").command(distribution.GIT, root=True) == (
        "pacman -S --noconfirm --needed git"
    )
