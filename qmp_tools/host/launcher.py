"""Install the packages that a command of ``./dmaproof`` needs and this machine does not have.

``./dmaproof`` runs this module with its own arguments before it builds dmaproof, so the module
imports only the standard library, and modules of this project that do the same::

    python3 -m qmp_tools.host.launcher prove --arch aarch64

Run by root, the module installs the packages; otherwise it prints the command that does. The exit
code is 3 if something is missing afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ..arch import ARCHITECTURES, find_architecture
from ..arch.architecture import Architecture
from ..exit_codes import EXIT_UNTESTED
from . import distribution
from .distribution import Distribution, Need

_WITHOUT_GUEST: Final = ("-h", "--help", "--version", "completion", "doctor", "list", "qemu")
"""Commands that only have to be built; `doctor` says what a proof needs."""
_KERNELS: Final = ((Path("/lib/modules"), "*/vmlinu*"), (Path("/boot"), "vmlinu*"))
_APT_LISTS: Final = Path("/var/lib/apt/lists")
_INSTALL_TIMEOUT_S: Final = 3600.0
_SHOWN_LINES: Final = 20


def main(arguments: Sequence[str]) -> int:
    """Install what ``./dmaproof`` with `arguments` needs, or print how to, and return 0 or 3."""
    needs = missing(arguments)
    host = distribution.host_distribution()
    installable = [need for need in needs if host.packages(need)]
    command = host.command(*installable, root=os.geteuid() == 0)
    if host.manager is None and needs:
        _say(host.how_to_install(*needs, root=False))
        return EXIT_UNTESTED
    for need in needs:
        if need not in installable:
            _say(f"no package of {host.name} has {need.what}")
    if command is None:
        return _refresh_apt(host)
    if os.geteuid() != 0:
        _say(f"packages are missing; run: {command}")
        return EXIT_UNTESTED
    _say(f"installing {' '.join(host.packages(*installable))}")
    return _run(command)


def missing(arguments: Sequence[str]) -> list[Need]:
    """Return what ``./dmaproof`` with `arguments` needs and this machine does not have."""
    command = arguments[0] if arguments else "--help"
    needs = _missing_for_build()
    if command not in _WITHOUT_GUEST:
        with contextlib.suppress(UsageError):  # dmaproof itself will report the wrong --arch
            needs += _missing_for_guest(arguments)
    if command in ("develop", "test"):
        needs += _missing_for_tests()
        if not any(word == "--fast" or word.startswith("tests/") for word in arguments):
            needs += _missing_for_other_guests()
    return needs


def _option(name: str, arguments: Sequence[str]) -> str | None:
    """Return the value of the last option `name`, which may be written with a space or with '='."""
    value = None
    for word, following in zip(arguments, (*arguments[1:], None), strict=True):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def _missing_for_build() -> list[Need]:
    minor = sys.version_info.minor
    needs = []
    if importlib.util.find_spec("ensurepip") is None:
        needs.append(distribution.python(minor))
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        needs.append(distribution.python_headers(minor))
    if shutil.which("cc") is None:
        needs.append(distribution.COMPILER)
    return needs


def _missing_for_guest(arguments: Sequence[str]) -> list[Need]:
    arch = find_architecture(_option("--arch", arguments))
    linux = _option("--guest", arguments) != "bare"
    needs = [] if _option("--qemu", arguments) else _missing_qemu(arch)
    if not arch.is_host:
        needs += _missing_cross_compiler(arch)
    elif linux:
        if not _links_static_programs():
            needs.append(distribution.STATIC_LIBC)
        if _option("--kernel", arguments) is None and not _has_kernel():
            needs.append(distribution.KERNEL)
    return needs


def _missing_qemu(arch: Architecture) -> list[Need]:
    return [] if distribution.system_qemu(arch) else [distribution.qemu(arch)]


def _missing_cross_compiler(arch: Architecture) -> list[Need]:
    # Fedora's cross compilers have no C library, and are enough for the bare guest.
    return [] if shutil.which(arch.cross_compiler) else [distribution.cross_compiler(arch)]


def _has_kernel() -> bool:
    """Return whether the machine has a kernel for the Linux guest; a container may have none."""
    # Without a kernel here, dmaproof fetches one as a package with apt.
    return shutil.which("apt-get") is not None or any(
        any(folder.glob(pattern)) for folder, pattern in _KERNELS
    )


def _links_static_programs() -> bool:
    """Return whether the C compiler can make programs such as the init of the Linux guest."""
    try:
        done = subprocess.run(
            ["cc", "-static", "-xc", "-o", os.devnull, "-"],
            input=b"int main(void) { return 0; }",
            capture_output=True,
            timeout=300,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0


def _missing_for_tests() -> list[Need]:
    programs = {
        "git": distribution.GIT,
        "qemu-img": distribution.QEMU_IMG,  # avocado-vt refuses to run without it
        "qemu-storage-daemon": distribution.STORAGE_DAEMON,
        "tcpdump": distribution.TCPDUMP,  # avocado-vt starts it
    }
    needs = [need for program, need in programs.items() if shutil.which(program) is None]
    if not _has_library("libvirt"):  # pip compiles libvirt-python
        needs.append(distribution.LIBVIRT_HEADERS)
    return needs


def _missing_for_other_guests() -> list[Need]:
    """Return what the whole test suite needs for guests beside the machine's own."""
    foreign = [arch for arch in ARCHITECTURES.values() if not arch.is_host]
    needs = [
        need for arch in foreign for need in (*_missing_qemu(arch), *_missing_cross_compiler(arch))
    ]
    if distribution.missing_kernel_tools():  # no distribution packages arm64's with 64K pages
        needs.append(distribution.KERNEL_TOOLS)
    return needs


def _has_library(name: str) -> bool:
    command = ["pkg-config", "--exists", name]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _refresh_apt(host: Distribution) -> int:
    """Fetch apt's package lists if it has none: dmaproof fetches kernels and QEMUs as packages.

    The images of containers come without these lists.
    """
    refresh = host.manager.refresh if host.manager else None
    if refresh is None or os.geteuid() != 0 or any(_APT_LISTS.glob("*_Packages*")):
        return 0
    return _run(refresh)


def _run(command: str) -> int:
    done = subprocess.run(
        command,
        shell=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode == 0:
        return 0
    print("\n".join(done.stdout.splitlines()[-_SHOWN_LINES:]), file=sys.stderr)
    _say(f"'{command}' failed with exit code {done.returncode}: its last lines are above")
    return EXIT_UNTESTED


def _say(message: str) -> None:
    print(f"dmaproof: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
