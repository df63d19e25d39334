"""The host's distribution: its package manager, and the names of its packages.

The launcher ``./dmaproof`` runs this module before anything is built, so it imports the standard
library, and modules that do the same. Package names are keyed by the *family* of a distribution.
All members of a family have the same package manager and the same names: Ubuntu's are Debian's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..arch.architecture import Architecture


@dataclass(frozen=True)
class PackageManager:
    """The package manager of a `family`; `program` is the program to look for.

    Package names are added to the commands `install` and `reinstall`, which installs packages again
    that are damaged. The command `refresh` has to run before, if there is one.
    """

    family: str
    program: str
    install: str
    reinstall: str
    refresh: str | None = None


_MANAGERS: Final = {
    manager.family: manager
    for manager in (
        PackageManager(
            "debian",
            "apt-get",
            "apt-get install -y --no-install-recommends",
            "apt-get install -y --no-install-recommends --reinstall",
            "apt-get update",
        ),
        PackageManager("fedora", "dnf", "dnf install -y", "dnf reinstall -y"),
        PackageManager("arch", "pacman", "pacman -S --noconfirm --needed", "pacman -S --noconfirm"),
        PackageManager(
            "suse",
            "zypper",
            "zypper install -y --no-recommends",
            "zypper install -y --no-recommends --force",
        ),
    )
}
_PACMAN_DATABASES: Final = Path("/var/lib/pacman/sync")
_OS_RELEASE: Final = (Path("/etc/os-release"), Path("/usr/lib/os-release"))
"""The files of os-release(5), in their order."""
_RED_HAT: Final = "rhel"
"""RHEL, CentOS Stream and their rebuilds are like Fedora, but have fewer packages."""
_RED_HAT_QEMU: Final = "/usr/libexec/qemu-kvm"
"""Their only QEMU, for guests of the machine's own architecture."""


@dataclass(frozen=True)
class Need:
    """Something that a package provides.

    `what` names it for a distribution that dmaproof does not know. `packages` has the packages of
    each family, separated by spaces; a family that is missing has no such package.
    """

    what: str
    packages: Mapping[str, str]


COMPILER: Final = Need(
    "a C compiler (cc)",
    {"debian": "gcc libc6-dev", "fedora": "gcc", "arch": "gcc", "suse": "gcc glibc-devel"},
)
STATIC_LIBC: Final = Need(
    "a C library that can be linked statically",
    {
        "debian": "libc6-dev",
        "fedora": "glibc-static",
        "arch": "glibc",
        "suse": "glibc-devel-static",
    },
)
KERNEL: Final = Need(
    "a kernel with its modules (/boot, /lib/modules)",
    {
        "debian": "linux-image-generic",
        "fedora": "kernel-core kernel-modules-core",
        "arch": "linux",
        "suse": "kernel-default",
    },
)
GIT: Final = Need("git", {"debian": "git", "fedora": "git-core", "arch": "git", "suse": "git-core"})
_QEMU_TOOLS: Final = {**dict.fromkeys(_MANAGERS, "qemu-img"), "debian": "qemu-utils"}
QEMU_IMG: Final = Need("qemu-img", _QEMU_TOOLS)
# In Debian 12, qemu-system-x86 depends on another package, which has this program.
STORAGE_DAEMON: Final = Need("qemu-storage-daemon", _QEMU_TOOLS)
LIBVIRT_HEADERS: Final = Need(
    "the headers of libvirt, and pkg-config",
    {
        "debian": "libvirt-dev pkg-config",
        "fedora": "libvirt-devel pkgconf-pkg-config",
        "arch": "libvirt pkgconf",
        "suse": "libvirt-devel pkg-config",
    },
)
TCPDUMP: Final = Need("tcpdump", dict.fromkeys(_MANAGERS, "tcpdump"))
_KERNEL_TOOLS: Final = ("gcc", "make", "flex", "bison", "bc", "tar", "xz")
KERNEL_TOOLS: Final = Need(
    f"the tools that build a kernel ({', '.join(_KERNEL_TOOLS)})",
    {
        **dict.fromkeys(_MANAGERS, "gcc make flex bison bc xz"),
        "debian": "gcc libc6-dev make flex bison bc xz-utils",
    },
)


def missing_kernel_tools() -> list[str]:
    """Return the programs that build a kernel and that this machine does not have."""
    return [program for program in _KERNEL_TOOLS if shutil.which(program) is None]


def python(minor: int) -> Need:
    """Return the need for Python 3.`minor`, which can make virtual environments."""
    return Need(
        f"Python 3.{minor} or newer, with venv",
        {
            "debian": f"python3.{minor} python3.{minor}-venv",
            "fedora": f"python3.{minor}",
            "arch": "python",
            "suse": f"python3{minor}",
        },
    )


def python_headers(minor: int) -> Need:
    """Return the need for the C headers of Python 3.`minor`."""
    return Need(
        f"the headers of Python 3.{minor}",
        {
            "debian": f"python3.{minor}-dev",
            "fedora": f"python3.{minor}-devel",
            "arch": "python",
            "suse": f"python3{minor}-devel",
        },
    )


def system_qemu(arch: Architecture) -> Path | None:
    """Return the QEMU for guests of `arch` that a package has installed; None if there is none."""
    programs = [arch.qemu_program]
    if arch.is_host:
        programs.append(_RED_HAT_QEMU)
    return next((Path(found) for found in map(shutil.which, programs) if found), None)


def qemu(arch: Architecture) -> Need:
    """Return the need for the QEMU of `arch`."""
    packages = dict(arch.qemu_packages)
    if arch.newer_qemu_package is not None:
        # apt installs the package that provides this name, which depends on the release.
        packages["debian"] = arch.qemu_program
    return Need(f"QEMU ({arch.qemu_program})", packages)


def cross_compiler(arch: Architecture) -> Need:
    """Return the need for a compiler that makes static programs for `arch`."""
    return Need(
        f"a compiler of static programs for another architecture ({arch.cross_compiler})",
        arch.cross_packages,
    )


@dataclass(frozen=True)
class Distribution:
    """A distribution by the name that it calls itself; `manager` is None if dmaproof does not know
    its package names."""

    name: str
    manager: PackageManager | None

    @property
    def family(self) -> str | None:
        """The family of the package manager; None if dmaproof does not know the distribution."""
        return self.manager.family if self.manager else None

    def packages(self, *needs: Need) -> list[str]:
        """Return the packages that provide `needs`, each once.

        A need that no package of the distribution provides is left out.
        """
        names = [
            name for need in needs for name in need.packages.get(self.family or "", "").split()
        ]
        return list(dict.fromkeys(names))

    def command(self, *needs: Need, root: bool, again: bool = False) -> str | None:
        """Return the command line that installs the packages of `needs`.

        Args:
            needs: what the packages are to provide.
            root: whether the user is root, who needs no sudo.
            again: whether installed packages are to be installed again, because they are damaged.

        Returns:
            None if there are no `needs`, or a package of one is not known.
        """
        manager = self.manager
        if manager is None or not needs or not all(self.packages(need) for need in needs):
            return None
        install = manager.reinstall if again else manager.install
        commands = [manager.refresh, f"{install} {' '.join(self.packages(*needs))}"]
        return " && ".join(
            command if root else f"sudo {command}" for command in commands if command is not None
        )

    def how_to_install(self, *needs: Need, root: bool) -> str:
        """Return what a user has to do so that the host has `needs`, for the end of a message."""
        if self.manager is None:
            wanted = "; ".join(need.what for need in needs)
            return f"install with the package manager of {self.name}: {wanted}"
        packaged = [need for need in needs if self.packages(need)]
        command = self.command(*packaged, root=root)
        sentences = [] if command is None else [f"run '{command}'"]
        absent = (need for need in needs if need not in packaged)
        sentences += [f"no package of {self.name} has {need.what}" for need in absent]
        return "; ".join(sentences)


def recognize(os_release: Mapping[str, str], programs: Collection[str]) -> Distribution:
    """Return the distribution that os-release(5) describes.

    Args:
        os_release: the fields of the file; empty if the file is missing.
        programs: the package managers that exist on the host.

    Returns:
        The distribution with the package manager of its family, if that exists. The family is the
        first one that ID or ID_LIKE names.
    """
    name = os_release.get("PRETTY_NAME") or os_release.get("NAME") or "this distribution"
    kin = f"{os_release.get('ID', '')} {os_release.get('ID_LIKE', '')}".split()
    managers = (_MANAGERS[family] for family in kin if family in _MANAGERS)
    manager = next((each for each in managers if each.program in programs), None)
    return Distribution(name, None if _RED_HAT in kin else manager)


def host_distribution() -> Distribution:
    """Return the distribution of this machine."""
    programs = {each.program for each in _MANAGERS.values() if shutil.which(each.program)}
    found = recognize(_read_os_release(), programs)
    manager = found.manager
    if manager and found.family == "arch" and not any(_PACMAN_DATABASES.glob("*.db")):
        # A container's image has no package databases, and pacman installs nothing without them.
        # Arch Linux supports no databases that are newer than the installed packages.
        fresh = replace(manager, install=manager.install.replace("-S", "-Syu", 1))
        return replace(found, manager=fresh)
    return found


def _read_os_release() -> dict[str, str]:
    for file in _OS_RELEASE:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        fields = (line.partition("=") for line in lines if not line.startswith("#"))
        return {name: value.strip("\"'") for name, _, value in fields}
    return {}


def how_to_install(*needs: Need) -> str:
    """Return what this user has to do so that this machine has `needs`."""
    return host_distribution().how_to_install(*needs, root=os.geteuid() == 0)
