"""What the machine has for a proof, what it lacks, and the one command that mends each.

`look` finds the facts out by trying (QEMU is asked over QMP, a static program is linked, a memfd is
made), and `examine` judges them; so what is said about any machine can be tested on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from dmaproof.errors import UntestableError

from .guest import bare as bare_guest
from .guest import compression
from .guest import linux as linux_guest
from .guest.build import cache, compile_c
from .host import archive
from .host.finding import Finding, State
from .host.run_folder import run_folder
from .host.timeout import DEFAULT_TIMEOUT_S
from .host.user_folders import cache_folder
from .qemu.builds import installed
from .qemu.choice import find_qemu
from .qemu.machine import MIB, format_memory
from .qemu.qemu import idle_qemu

OLDEST_PYTHON: Final = (3, 11)
_KVM: Final = Path("/dev/kvm")
_KVM_MISC_DEVICE: Final = Path("/sys/class/misc/kvm")
"""There where the running kernel has KVM; a container sees it even if /dev/kvm is kept from it."""
_DEVELOPERS_EXTRAS: Final = {"docs", "mutation", "test"}
"""For work on dmaproof itself; `./dmaproof test` installs them."""
_OVERHEAD_BYTES: Final = 128 * MIB
"""What a QEMU needs besides its guest's RAM, and the share of the device and the tool."""
GUEST_MEMORY_BYTES: Final = {"bare": bare_guest.MEMORY_BYTES, "linux": linux_guest.MEMORY_BYTES}


@dataclass(frozen=True)
class Facts:
    """What there is. Sizes in bytes; an error is the text of what went wrong.

    `compiler` is 'static' where static programs can be linked, 'dynamic' where only others can, and
    None where there is no compiler. `qemu_error` tells why the QEMU that is there does not run.
    `archive_error` tells why QEMUs cannot be fetched from Debian's archive. `kernel` is 'kept',
    'available', or what is wrong with it. `missing_formats` has the formats of compressed kernels
    that this Python cannot decompress, and the module that each needs. `kvm` is 'usable',
    'forbidden', 'withheld' (the kernel has it, a container does not) or 'absent', `kvm_group` the
    group that owns it, and `virtualization` the processor's feature, 'vmx' or 'svm'. `extras` has
    the packages that each optional extra lacks.
    """

    root: bool
    apt: bool
    python: tuple[int, int]
    qemu: str | None
    qemu_error: str | None
    fetched: Sequence[str]
    archive_error: str | None
    compiler: str | None
    kernel: str
    missing_formats: Mapping[str, str]
    kvm: str
    kvm_group: str | None
    virtualization: str | None
    memory_available: int
    memfd_error: str | None
    temporary_error: str | None
    cache_error: str | None
    extras: Mapping[str, Sequence[str]]


def examine(facts: Facts, guest: str) -> list[Finding]:
    """What the facts mean for a proof with `guest`."""
    return [
        _python(facts),
        _qemu(facts),
        _fetched(facts),
        _compiler(facts, guest),
        *([_kernel(facts)] if guest == "linux" else []),
        _kvm(facts),
        _memory(facts, guest),
        _shared_memory(facts),
        _temporary_folder(facts),
        _cache_folder(facts),
        *(_extra(name, lacking) for name, lacking in facts.extras.items()),
    ]


def can_prove(findings: Sequence[Finding]) -> bool:
    """Whether nothing is missing that a proof needs."""
    return all(finding.state != State.MISSING for finding in findings)


def _as_root(facts: Facts, command: str) -> str:
    return command if facts.root else f"sudo {command}"


def _install(facts: Facts, packages: str) -> str:
    if not facts.apt:
        return f"install what Debian has in {packages}, with your distribution's own tool"
    update, install = (
        _as_root(facts, f"apt-get {command}")
        for command in ("update", f"install -y --no-install-recommends {packages}")
    )
    return f"{update} && {install}"


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python >= OLDEST_PYTHON:
        return Finding("Python", State.OK, version)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Finding(
        "Python",
        State.MISSING,
        f"{version}, and {oldest} is the oldest that does",
        _install(facts, f"python{oldest} python{oldest}-venv"),
    )


def _qemu(facts: Facts) -> Finding:
    if facts.qemu is not None:
        return Finding("QEMU", State.OK, facts.qemu)
    if facts.qemu_error is None:
        return Finding("QEMU", State.MISSING, "there is none", _install(facts, "qemu-system-x86"))
    remedy = _install(facts, "--reinstall qemu-system-x86")
    return Finding("QEMU", State.MISSING, facts.qemu_error, remedy)


def _fetched(facts: Facts) -> Finding:
    if facts.fetched:
        return Finding("fetched QEMUs", State.OK, ", ".join(facts.fetched))
    remedy = "dmaproof qemu fetch 11.1"
    if not facts.apt:
        remedy = "needs Debian's apt"
    elif facts.archive_error is not None:
        update = _as_root(facts, "apt-get update")
        remedy = f"on Debian, or in a container of it: {update} && {remedy}"
    return Finding("fetched QEMUs", State.LIMITED, "none: only one version to prove", remedy)


def _compiler(facts: Facts, guest: str) -> Finding:
    what = {
        None: "there is none, and the guest is compiled here",
        "dynamic": "cannot link a static program, which the Linux guest's init is",
        "static": "links static programs",
    }[facts.compiler]
    if facts.compiler == "static":
        return Finding("C compiler", State.OK, what)
    needed = facts.compiler is None or guest == "linux"
    state = State.MISSING if needed else State.LIMITED
    return Finding("C compiler", state, what, _install(facts, "gcc libc6-dev"))


def _kernel(facts: Facts) -> Finding:
    name = "guest's kernel"
    if facts.kernel == "kept":
        return Finding(name, State.OK, f"in {cache()}")
    if facts.kernel == "available" and facts.missing_formats:
        formats = (f"{name} (module {it})" for name, it in facts.missing_formats.items())
        return Finding(
            name,
            State.MISSING,
            f"apt has it, but this Python cannot decompress {', '.join(formats)}",
            _python_module(facts),
        )
    if facts.kernel == "available":
        return Finding(name, State.OK, "apt has it; fetched with the first proof")
    remedy = "dmaproof prove --guest bare"
    if facts.apt:
        remedy = f"on Debian: {_as_root(facts, 'apt-get update')}; elsewhere: {remedy}"
        return Finding(name, State.MISSING, facts.kernel, remedy)
    return Finding(name, State.MISSING, "it comes by apt, which is not here", remedy)


def _python_module(facts: Facts) -> str:
    if "backports.zstd" in facts.missing_formats.values():
        return f"{sys.executable} -m pip install backports-zstd"
    return "run dmaproof with a Python that has its whole standard library, such as Debian's"


def _kvm(facts: Facts) -> Finding:
    if facts.kvm == "usable":
        return Finding("KVM", State.OK, f"{_KVM} opens; a proof tries whether it runs its guest")
    if facts.kvm == "forbidden":
        what = f"{_KVM} may not be opened by this user: proofs use TCG"
        group = facts.kvm_group
        if group is None or group == "root":
            return Finding("KVM", State.LIMITED, what, _as_root(facts, f"chmod a+rw {_KVM}"))
        remedy = f"{_as_root(facts, f'usermod -aG {group} $USER')} (and log in again)"
        return Finding("KVM", State.LIMITED, what, remedy)
    what = f"there is no {_KVM}: proofs use TCG"
    if facts.kvm == "withheld":
        remedy = f"start this container with --device {_KVM}: the kernel outside has KVM"
        return Finding("KVM", State.LIMITED, what, remedy)
    module = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(facts.virtualization or "")
    if module is None:
        remedy = "switch virtualization on in the firmware, or nesting in the hypervisor"
        return Finding("KVM", State.LIMITED, what, remedy)
    return Finding("KVM", State.LIMITED, what, _as_root(facts, f"modprobe {module}"))


def _memory(facts: Facts, guest: str) -> Finding:
    needed = 2 * (GUEST_MEMORY_BYTES[guest] + _OVERHEAD_BYTES)
    what = f"{facts.memory_available // MIB} MiB are free, two QEMUs need {format_memory(needed)}"
    if facts.memory_available >= needed:
        return Finding("memory", State.OK, what)
    smaller = "end something else" if guest == "bare" else "dmaproof prove --guest bare"
    return Finding("memory", State.MISSING, what, smaller)


def _shared_memory(facts: Facts) -> Finding:
    if facts.memfd_error is None:
        return Finding("shared memory", State.OK, "memfds can be made")
    return Finding(
        "shared memory",
        State.MISSING,
        f"no memfd: {facts.memfd_error}",
        "allow memfd_create (a container's seccomp profile forbids it?)",
    )


def _temporary_folder(facts: Facts) -> Finding:
    if facts.temporary_error is None:
        return Finding("temporary folder", State.OK, tempfile.gettempdir())
    return Finding("temporary folder", State.MISSING, facts.temporary_error, "export TMPDIR=/tmp")


def _cache_folder(facts: Facts) -> Finding:
    name = "cache folder"
    if facts.cache_error is None:
        return Finding(name, State.OK, f"{cache_folder()}")
    return Finding(name, State.MISSING, facts.cache_error, "export XDG_CACHE_HOME=/var/tmp/cache")


def _extra(name: str, lacking: Sequence[str]) -> Finding:
    title = f"extra '{name}'"
    if not lacking:
        return Finding(title, State.OK, "installed")
    what = f"without {', '.join(lacking)}"
    return Finding(title, State.LIMITED, what, f"pip install 'dmaproof[{name}]'")


def look() -> Facts:
    """The facts about this machine. Nothing is installed or changed."""
    temporary_error = _try_temporary_folder()
    qemu, qemu_error = _look_for_qemu(ask=temporary_error is None)
    kvm, group = _look_for_kvm()
    return Facts(
        root=os.geteuid() == 0,
        apt=_runs("apt-get", "--version"),
        python=sys.version_info[:2],
        qemu=qemu,
        qemu_error=qemu_error,
        fetched=[build.version for build in installed()],
        archive_error=_look_for_archive(),
        compiler=_look_for_compiler(),
        kernel=_look_for_kernel(),
        missing_formats=compression.missing_modules(),
        kvm=kvm,
        kvm_group=group,
        virtualization=_look_for_virtualization(),
        memory_available=_look_for_memory(),
        memfd_error=_try_memfd(),
        temporary_error=temporary_error,
        cache_error=_try_cache_folder(),
        extras=_look_for_extras(),
    )


def _runs(*command: str) -> bool:
    try:
        return not subprocess.run(command, capture_output=True, timeout=30, check=False).returncode
    except OSError:
        return False


def _look_for_qemu(*, ask: bool) -> tuple[str | None, str | None]:
    try:
        binary = find_qemu(None)
    except UntestableError:
        return None, None
    if not ask:  # that needs a folder for its log
        return str(binary), None
    try:
        return f"{asyncio.run(_version(binary))} ({binary})", None
    except UntestableError as error:
        return None, str(error)


async def _version(binary: Path) -> str:
    async with idle_qemu("doctor's", binary, timeout_s=DEFAULT_TIMEOUT_S) as qemu:
        return qemu.version


def _look_for_compiler() -> str | None:
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError:  # which is a finding of its own
        return "static" if shutil.which("cc") else None
    with temporary as folder:
        source = Path(folder) / "try.c"
        source.write_text("int main(void) { return 0; }\n")
        for kind, options in (("static", ["-static", "-pthread"]), ("dynamic", [])):
            try:
                compile_c([source], Path(folder) / "try", *options)
            except UntestableError:
                continue
            return kind
    return None


def _look_for_kernel() -> str:
    # Without a cache there is no kernel in it; the cache is a finding of its own.
    with contextlib.suppress(OSError, UntestableError):
        if linux_guest.kernel_folder().is_dir():
            return "kept"
    try:
        archive.dependencies("linux-image-amd64")
    except UntestableError:
        return "apt knows no linux-image-amd64, which is Debian's"
    return "available"


def _look_for_archive() -> str | None:
    try:
        archive.own_codename()
    except UntestableError as error:
        return str(error)
    return None


def _look_for_kvm() -> tuple[str, str | None]:
    try:
        owner = _KVM.stat().st_gid
    except OSError:
        return "withheld" if _KVM_MISC_DEVICE.exists() else "absent", None
    try:
        group = grp.getgrgid(owner).gr_name
    except KeyError:
        group = str(owner)
    return "usable" if os.access(_KVM, os.R_OK | os.W_OK) else "forbidden", group


def _look_for_virtualization() -> str | None:
    found = re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text())
    return found[1] if found else None


def _look_for_memory() -> int:
    """MemAvailable, see proc_meminfo(5)."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _try_memfd() -> str | None:
    try:
        os.close(os.memfd_create("dmaproof-doctor"))
    except OSError as error:
        return error.strerror
    return None


def _try_temporary_folder() -> str | None:
    try:
        with run_folder():
            pass
    except UntestableError as error:
        return str(error)
    except OSError as error:
        return f"{tempfile.gettempdir()}: {error.strerror}"
    return None


def _try_cache_folder() -> str | None:
    try:
        folder = cache_folder()
    except UntestableError as error:
        return str(error)
    there = next(it for it in (folder, *folder.parents) if os.access(it, os.F_OK))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"guests are kept in {folder}, and {there} cannot be written to"
    return None


def _look_for_extras() -> dict[str, list[str]]:
    """Each extra for users of the installed dmaproof, with the packages that are not there."""
    distribution = metadata.distribution("dmaproof")
    required = [Requirement(line) for line in distribution.requires or []]
    return {
        extra: [
            it.name
            for it in required
            if it.marker and it.marker.evaluate({"extra": extra}) and not _fits(it)
        ]
        for extra in distribution.metadata.get_all("Provides-Extra") or []
        if extra not in _DEVELOPERS_EXTRAS
    }


def _fits(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
