"""The prerequisites of a proof: which are missing on this machine, and how to fix each.

`gather_facts` finds the facts by trying: it asks QEMU over QMP, links a static program, makes a
memfd. `examine` judges facts of any machine, so the tests can try all cases on one machine.
"""

from __future__ import annotations

import asyncio
import grp
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from dmaproof.errors import DmaproofError, UntestableError

from .arch import host_architecture
from .arch.architecture import Architecture
from .guest import bare as bare_guest
from .guest import compression
from .guest import linux as linux_guest
from .guest.build import compile_c
from .guest.kernels import kernel_source
from .host import archive, distribution
from .host.distribution import Distribution, Need
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
"""Exists if the running kernel has KVM; a container sees it even if it has no /dev/kvm."""
_DEVELOPER_EXTRAS: Final = {"docs", "mutation", "test"}
"""Extras for work on dmaproof itself; `./dmaproof test` installs them."""
_COMPILERS: Final = {
    "static": ("-static", "-pthread"),
    "freestanding": ("-static", "-ffreestanding", "-nostdlib", "-Wl,-e,main"),
}
"""What a C compiler can link, and the options with which to try it; the best first."""
_OVERHEAD_BYTES: Final = 128 * MIB
"""Memory of a QEMU besides its guest's RAM, with its share of the device and the tool."""
GUEST_MEMORY_BYTES: Final = {"bare": bare_guest.MEMORY_BYTES, "linux": linux_guest.MEMORY_BYTES}


@dataclass(frozen=True)
class Facts:
    """The facts about a machine. Sizes are in bytes; an error is the text of a message.

    `architecture` is the guest's, and `native` says whether it is the machine's too. `qemu_error`
    says why the QEMU that was found does not run, and `archive_error` why QEMUs cannot be fetched
    from Debian's archive. `compiler` is 'static' if it can link static programs for the guest,
    'freestanding' if it can link only programs without a C library, and None if no compiler was
    found. `kernel` says where the guest's kernel comes from, `kernel_error` why none was found, and
    `kernel_cached` whether the kernel has been unpacked. `missing_formats` maps the formats of
    compressed kernels that this Python cannot decompress to the module that each needs. `kvm` is
    'usable', 'forbidden', 'withheld' (the kernel has it, the container does not) or 'absent'.
    `kvm_group` is the group that owns /dev/kvm, and `kvm_module` the kernel's module for the
    processor's virtualization, if that is known. `extras` maps each optional extra to its missing
    packages.
    """

    root: bool
    distribution: Distribution
    architecture: Architecture
    native: bool
    python: tuple[int, int]
    qemu: str | None
    qemu_error: str | None
    fetched: Sequence[str]
    archive_error: str | None
    compiler: str | None
    kernel: str | None
    kernel_error: str | None
    kernel_cached: bool
    missing_formats: Mapping[str, str]
    kvm: str
    kvm_group: str | None
    kvm_module: str | None
    memory_available: int
    memfd_error: str | None
    temporary_error: str | None
    cache_error: str | None
    extras: Mapping[str, Sequence[str]]


def examine(facts: Facts, guest: str) -> list[Finding]:
    """Judge the facts for a proof with `guest`."""
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
        *(_extra(name, missing) for name, missing in facts.extras.items()),
    ]


def can_prove(findings: Sequence[Finding]) -> bool:
    """Return whether every prerequisite of a proof exists."""
    return all(finding.state != State.MISSING for finding in findings)


def _as_root(facts: Facts, command: str) -> str:
    return command if facts.root else f"sudo {command}"


def _install(facts: Facts, *needs: Need, again: bool = False) -> str:
    command = facts.distribution.command(*needs, root=facts.root, again=again)
    return command or facts.distribution.how_to_install(*needs, root=facts.root)


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python >= OLDEST_PYTHON:
        return Finding("Python", State.OK, version)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    what = f"found {version}, need {oldest} or newer"
    remedy = _install(facts, distribution.python(OLDEST_PYTHON[1]))
    return Finding("Python", State.MISSING, what, remedy)


def _qemu(facts: Facts) -> Finding:
    if facts.qemu is not None:
        return Finding("QEMU", State.OK, facts.qemu)
    remedy = _install(
        facts, distribution.qemu(facts.architecture), again=facts.qemu_error is not None
    )
    what = facts.qemu_error or f"{facts.architecture.qemu_program} was not found"
    return Finding("QEMU", State.MISSING, what, remedy)


def _fetched(facts: Facts) -> Finding:
    if facts.fetched:
        return Finding("fetched QEMUs", State.OK, ", ".join(facts.fetched))
    remedy = "dmaproof qemu fetch 11.1"
    if not facts.native:
        remedy += f" --arch {facts.architecture.name}"
    if facts.distribution.family != "debian":
        remedy = "use --qemu PATH with another QEMU; only Debian's apt can fetch one"
    elif facts.archive_error is not None:
        update = _as_root(facts, "apt-get update")
        remedy = f"on Debian, or in a Debian container: {update} && {remedy}"
    return Finding(
        "fetched QEMUs", State.LIMITED, "none, so proofs can use only one version", remedy
    )


def _compiler(facts: Facts, guest: str) -> Finding:
    compiler = "cc" if facts.native else facts.architecture.cross_compiler
    what = {
        None: f"{compiler} was not found, and the guest has to be compiled",
        "freestanding": f"{compiler} cannot link static programs, such as the Linux guest's init",
        "static": f"{compiler} links static programs",
    }[facts.compiler]
    if facts.compiler == "static":
        return Finding("C compiler", State.OK, what)
    needed = facts.compiler is None or guest == "linux"
    needs = [distribution.cross_compiler(facts.architecture)]
    if facts.native:
        needs = [distribution.COMPILER, distribution.STATIC_LIBC]
    remedy = _install(facts, *needs)
    if facts.compiler and not facts.native and facts.distribution.family != "debian":
        # Fedora's cross compilers have no C library.
        remedy = f"dmaproof prove --guest bare --arch {facts.architecture.name}"
    return Finding("C compiler", State.MISSING if needed else State.LIMITED, what, remedy)


def _kernel(facts: Facts) -> Finding:
    name = "guest's kernel"
    if facts.kernel is None:
        what = facts.kernel_error or "not found"
        return Finding(name, State.MISSING, what, _kernel_remedy(facts))
    if facts.missing_formats and not facts.kernel_cached:
        formats = (f"{name} (module {module})" for name, module in facts.missing_formats.items())
        what = f"{facts.kernel}; this Python cannot decompress {', '.join(formats)}"
        return Finding(name, State.MISSING, what, _python_module(facts))
    return Finding(name, State.OK, facts.kernel)


def _kernel_remedy(facts: Facts) -> str:
    if facts.missing_formats:
        return _python_module(facts)
    if not facts.native:
        return f"--kernel FILE --modules FOLDER, with a kernel for {facts.architecture.name}"
    if facts.distribution.family == "debian":
        return f"{_as_root(facts, 'apt-get update')}, or dmaproof prove --guest bare"
    return _install(facts, distribution.KERNEL)


def _python_module(facts: Facts) -> str:
    if "backports.zstd" in facts.missing_formats.values():
        return f"{sys.executable} -m pip install backports-zstd"
    return "run dmaproof with a Python that has its whole standard library, such as Debian's"


def _kvm(facts: Facts) -> Finding:
    if not facts.native:
        what = (
            f"runs only guests of this machine's architecture: {facts.architecture.name} uses TCG"
        )
        return Finding("KVM", State.LIMITED, what)
    if facts.kvm == "usable":
        return Finding(
            "KVM", State.OK, f"{_KVM} can be opened; each proof checks whether KVM runs its guest"
        )
    if facts.kvm == "forbidden":
        what = f"this user may not open {_KVM}: proofs use TCG"
        group = facts.kvm_group
        if group is None or group == "root":
            return Finding("KVM", State.LIMITED, what, _as_root(facts, f"chmod a+rw {_KVM}"))
        remedy = f"{_as_root(facts, f'usermod -aG {group} $USER')} (and log in again)"
        return Finding("KVM", State.LIMITED, what, remedy)
    what = f"{_KVM} does not exist: proofs use TCG"
    if facts.kvm == "withheld":
        remedy = f"start this container with --device {_KVM}: the host's kernel has KVM"
        return Finding("KVM", State.LIMITED, what, remedy)
    if facts.kvm_module is None:
        return Finding("KVM", State.LIMITED, what, facts.architecture.kvm_remedy)
    return Finding("KVM", State.LIMITED, what, _as_root(facts, f"modprobe {facts.kvm_module}"))


def _memory(facts: Facts, guest: str) -> Finding:
    needed = 2 * (GUEST_MEMORY_BYTES[guest] + _OVERHEAD_BYTES)
    what = f"{facts.memory_available // MIB} MiB are free, two QEMUs need {format_memory(needed)}"
    if facts.memory_available >= needed:
        return Finding("memory", State.OK, what)
    smaller = "end other programs" if guest == "bare" else "dmaproof prove --guest bare"
    return Finding("memory", State.MISSING, what, smaller)


def _shared_memory(facts: Facts) -> Finding:
    if facts.memfd_error is None:
        return Finding("shared memory", State.OK, "memfd_create works")
    return Finding(
        "shared memory",
        State.MISSING,
        f"memfd_create fails: {facts.memfd_error}",
        "allow memfd_create (a container's seccomp profile may forbid it)",
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


def _extra(name: str, missing: Sequence[str]) -> Finding:
    title = f"extra '{name}'"
    if not missing:
        return Finding(title, State.OK, "installed")
    what = f"not installed: {', '.join(missing)}"
    return Finding(title, State.LIMITED, what, f"pip install 'dmaproof[{name}]'")


def gather_facts(architecture: Architecture) -> Facts:
    """Find the facts about this machine, for guests of `architecture`; nothing is changed."""
    temporary_error = _try_temporary_folder()
    qemu, qemu_error = _look_for_qemu(architecture, ask=temporary_error is None)
    kernel, kernel_error, kernel_cached = _look_for_kernel(architecture)
    kvm, group = _look_for_kvm()
    return Facts(
        root=os.geteuid() == 0,
        distribution=distribution.host_distribution(),
        architecture=architecture,
        native=architecture is host_architecture(),
        python=sys.version_info[:2],
        qemu=qemu,
        qemu_error=qemu_error,
        fetched=[build.version for build in installed(architecture)],
        archive_error=_look_for_archive(),
        compiler=_look_for_compiler(architecture),
        kernel=kernel,
        kernel_error=kernel_error,
        kernel_cached=kernel_cached,
        missing_formats=compression.missing_modules(),
        kvm=kvm,
        kvm_group=group,
        kvm_module=_look_for_kvm_module(architecture),
        memory_available=_look_for_memory(),
        memfd_error=_try_memfd(),
        temporary_error=temporary_error,
        cache_error=_try_cache_folder(),
        extras=_look_for_extras(),
    )


def _look_for_qemu(architecture: Architecture, *, ask: bool) -> tuple[str | None, str | None]:
    try:
        binary = find_qemu(None, architecture)
    except UntestableError:
        return None, None
    if not ask:  # to ask QEMU, it takes a folder for its log
        return str(binary), None
    try:
        return f"{asyncio.run(_version(binary))} ({binary})", None
    except UntestableError as error:
        return None, str(error)


async def _version(binary: Path) -> str:
    async with idle_qemu("doctor's", binary, timeout_s=DEFAULT_TIMEOUT_S) as qemu:
        return qemu.version


def _look_for_compiler(architecture: Architecture) -> str | None:
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError:  # the temporary folder is a finding of its own
        return "static" if shutil.which("cc") else None
    with temporary as folder:
        source = Path(folder) / "try.c"
        source.write_text("int main(void) { return 0; }\n")
        for kind, options in _COMPILERS.items():
            try:
                compile_c([source], Path(folder) / "try", *options, architecture=architecture)
            except UntestableError:
                continue
            return kind
    return None


def _look_for_kernel(architecture: Architecture) -> tuple[str | None, str | None, bool]:
    try:
        source = kernel_source(architecture)
    except DmaproofError as error:
        return None, str(error), False
    if source.is_fetched:
        return source.text, None, True
    return f"{source.text}, fetched with the first proof", None, False


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


def _look_for_kvm_module(architecture: Architecture) -> str | None:
    words = set(Path("/proc/cpuinfo").read_text().split())
    found = (module for word, module in architecture.kvm_modules.items() if word in words)
    return next(found, None)


def _look_for_memory() -> int:
    """Return MemAvailable in bytes, see proc_meminfo(5)."""
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
    existing = next(each for each in (folder, *folder.parents) if os.access(each, os.F_OK))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"guests are cached in {folder}, but {existing} cannot be written to"
    return None


def _look_for_extras() -> dict[str, list[str]]:
    """Return the missing packages of each extra for users of the installed dmaproof."""
    distribution = metadata.distribution("dmaproof")
    required = [Requirement(line) for line in distribution.requires or []]
    return {
        extra: [
            each.name
            for each in required
            if each.marker and each.marker.evaluate({"extra": extra}) and not _is_installed(each)
        ]
        for extra in distribution.metadata.get_all("Provides-Extra") or []
        if extra not in _DEVELOPER_EXTRAS
    }


def _is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
