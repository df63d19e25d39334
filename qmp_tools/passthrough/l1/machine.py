"""Boot L1 and run one command in it, with a timeout; L1 is an ordinary QEMU process of the run.

A folder of the run is shared with L1 at /mnt. It holds the command, and the files that the command
writes. The lines that the command prints are passed on while it runs. Several machines may run the
same command side by side, with one /mnt, and divide the work among themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Final

from dmaproof import _core, _mapping, _userfault, errors
from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError, printable

from ...arch.x86_64 import X86_64
from ...devices.registry import IN_L1
from ...guest.build import sources
from ...host.process import log_tail
from ...host.unpacked_root import run_inside
from ...host.user_folders import cache_folder
from ...qemu import qemu_qmp
from ...qemu.machine import option_value
from ...qemu.qemu import OwnedQemu, running_qemu
from .kernel import DEFAULT_KERNEL, KERNELS, MODULE, l1_module
from .packaged import packaged_kernel
from .root import COMPILE_PYTHON, l1_root
from .selftests import SELFTESTS, Hardware
from .stock import STOCK, stock_kernel
from .tree import BuiltKernel, check_source, tree_kernel

_logger = logging.getLogger(__name__)

_SHARE: Final = "trans=virtio,version=9p2000.L,msize=512000"
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet panic=-1 nokaslr tsc=reliable no_timer_check "
    "transparent_hugepage=madvise iommufd.allow_unsafe_interrupts=1 "
    f"root=root rootfstype=9p rootflags={_SHARE},cache=loose "
    "ro init=/init"
)
TESTED_QEMU: Final = "DMAPROOF_TESTED_QEMU"
"""The environment variable that names a QEMU other than that of L1's root file system."""
TESTED_QEMU_PATH: Final = f"/run/qemu/{X86_64.qemu_program}"
"""Where L1 has that QEMU."""
_DISTRIBUTION: Final = "dmaproof"
JOB: Final = "job"
"""The folder in the run's folder that is /mnt in L1."""
_PYTHON: Final = "python"
_CACHE: Final = "cache"
FIRST: Final = 1
"""The number of the machine that has `L1.first`."""
_LAST_LINES: Final = 15
"""The number of a command's last lines that the error for its failure quotes."""


@dataclass(frozen=True)
class L1:
    """The files and the options of an L1."""

    root: Path
    kernel: Path
    module: Path
    qemu: Path | None = None
    """The folder of a fetched QEMU, or that of `qemu_for_l1`; `TESTED_QEMU` names it in L1."""
    memory_mib: int = 2048
    processors: int = 2
    """Should have one of the host's each: a kernel waits actively for its other processors."""
    origin: str | None = None
    """The source of the kernel, if it is the user's."""
    counting: bool = False
    """Whether L1's clock counts instructions, one as a nanosecond, on one CPU."""
    first: Hardware | None = None
    """What the first of several machines has besides, for the kernel's selftests."""


def l1(version: str = DEFAULT_KERNEL, *, falls_back: bool = True) -> L1:
    """Return an L1 with the kernel `version`; the first build takes about 6 minutes on two cores.

    If that kernel cannot be built, and with `falls_back`, L1 has Debian's stock kernel, as with
    `version` "stock".

    Raises:
        UsageError: dmaproof knows no such kernel.
        UntestableError: L1 cannot be built; the message says what is missing.
    """
    if version not in (*KERNELS, STOCK):
        raise UsageError(
            f"kernel {version} of the nested machine L1: expected one of "
            f"{', '.join((*KERNELS, STOCK))}"
        )
    root = _root()
    if version != STOCK:
        try:
            return _with(root, packaged_kernel(root, version))
        except UntestableError as error:
            if not falls_back:
                raise
            _logger.warning(
                "%s\nusing Debian's stock kernel instead, which supports fewer of the proofs", error
            )
    kernel = stock_kernel()
    return L1(root, kernel, l1_module(root, kernel))


def l1_of_source(source: Path) -> L1:
    """Return an L1 with the kernel of the tree `source`; see `tree_kernel`.

    Raises:
        UsageError, UntestableError: the kernel cannot be built; the message says why.
    """
    check_source(source)
    root = _root()
    return _with(root, tree_kernel(root, source))


def l1_of_patches(patches: Sequence[Path]) -> L1:
    """Return an L1 with the default kernel and `patches`; see `packaged_kernel`.

    Raises:
        UsageError, UntestableError: a patch does not apply, or the kernel cannot be built.
    """
    root = _root()
    return _with(root, packaged_kernel(root, DEFAULT_KERNEL, patches))


def _with(root: Path, kernel: BuiltKernel) -> L1:
    return L1(root, kernel.folder, kernel.module, origin=kernel.origin)


def _root() -> Path:
    if not X86_64.is_host:
        raise UntestableError(
            f"the nested machine L1 is made of this machine's packages and must be {X86_64.name}, "
            f"but this machine is {platform.machine()}; use an {X86_64.name} machine"
        )
    return l1_root()


async def run_in_l1(
    machine: L1,
    binary: Path,
    command: str,
    folder: Path,
    on_line: Callable[[str], None],
    timeout_s: float,
    *,
    files: Sequence[Path] = (),
    guests: Sequence[Path] = (),
    machines: int = 1,
) -> Path:
    """Boot L1 with the QEMU `binary`, run the shell `command` in it, and wait for its end.

    The command finds dmaproof's Python packages in PYTHONPATH, the kernel modules that L1 needs in
    /mnt/modules, `files` in /mnt, and `guests`, programs in the cache of guests, in its own cache.
    `machines` of them run side by side; MACHINE is the number of
    each one, from 1 on. If one fails, the others are ended.

    Args:
        on_line: called with each line that a command prints.
        timeout_s: bounds the wait for each of these lines.

    Returns:
        The folder that was /mnt.

    Raises:
        WaitTimeoutError: a machine printed no line within the timeout.
        UntestableError: a machine does not boot or ends early, or its command fails.
    """
    job = folder / JOB
    _fill(job, machine, command, files, guests, timeout_s)
    tasks = [
        asyncio.create_task(run_machine(number, machine, binary, folder, on_line, timeout_s))
        for number in range(1, machines + 1)
    ]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second request would interrupt its cleaning up
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return job


async def run_machine(
    number: int,
    machine: L1,
    binary: Path,
    folder: Path,
    on_line: Callable[[str], None],
    timeout_s: float,
) -> None:
    """Run machine `number` of `run_in_l1`, which has filled /mnt, until its command ends.

    Raises:
        WaitTimeoutError, UntestableError: see `run_in_l1`.
    """
    job = folder / JOB
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    loop = asyncio.get_running_loop()
    arguments = [*X86_64.channels, *_arguments(number, machine, job)]
    if machine.first is not None and number == FIRST:
        binary = machine.first.binary
    async with running_qemu(
        f"L1-{number}", binary, arguments, folder, timeout_s=timeout_s
    ) as running:
        try:
            async with asyncio.timeout(timeout_s) as silence:
                async for line in _lines(running):
                    silence.reschedule(loop.time() + timeout_s)
                    last_lines.append(f"    {line}")
                    on_line(line)
                await running.process.died
        except TimeoutError:
            message = [
                f"the nested machine L1 has printed nothing for {timeout_s:g} s; its last lines:",
                *last_lines,
                log_tail(running.console),
            ]
            raise WaitTimeoutError("\n".join(message).rstrip()) from None
    try:
        code = int((job / f"exit-code-{number}").read_text())
    except (OSError, ValueError):
        raise UntestableError(
            f"the nested machine L1 {running.process.how_it_ended()} before its command ended\n"
            f"{running.process.log_tail()}\n{log_tail(running.console)}".rstrip()
        ) from None
    if code:
        message = [
            f"the command in the nested machine L1 ended with exit code {code}; its last lines:",
            *last_lines,
        ]
        raise UntestableError("\n".join(message))


async def _lines(running: OwnedQemu) -> AsyncIterator[str]:
    with contextlib.suppress(ConnectionError):
        while line := await running.report.readline():
            yield printable(line.decode(errors="replace").rstrip())


def _arguments(number: int, machine: L1, job: Path) -> list[str]:
    initramfs = machine.kernel / "initramfs"
    line = f"{_COMMAND_LINE} MACHINE={number}"
    if machine.counting:
        # Without erms and fsrm: REP MOVSB and STOSB would count one instruction for each byte.
        cpu = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        cpu += ["-cpu", "max,erms=off,fsrm=off"]
    else:
        cpu = ["-accel", "tcg,thread=multi", "-smp", f"{machine.processors}", "-cpu", "max"]
    memory_mib = machine.memory_mib
    devices: tuple[str, ...] = ()
    if machine.first is not None and number == FIRST:
        memory_mib, devices = machine.first.memory_mib, machine.first.arguments
    return [
        *("-machine", "q35", *cpu, "-m", f"{memory_mib}M", "-no-reboot", *devices),
        *("-kernel", os.fspath(machine.kernel / "vmlinux"), "-append", line),
        *(("-initrd", os.fspath(initramfs)) if initramfs.exists() else ()),
        *_share("root", machine.root),
        *_share("python", job / _PYTHON),
        *(_share("qemu", machine.qemu) if machine.qemu else ()),
        *_share("job", job, readonly=False),
    ]


def _share(tag: str, folder: Path, *, readonly: bool = True) -> list[str]:
    option = ",readonly=on" if readonly else ""
    return [
        *("-fsdev", f"local,id={tag},path={option_value(folder)},security_model=none{option}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


def _mount(tag: str) -> str:
    """Return the shell commands that mount a share read-only; L1 may cache it."""
    where = f"/run/{tag}"
    return f"mkdir {where} && mount -t 9p -o {_SHARE},cache=loose,ro {tag} {where} || exit 3\n"


def _fill(
    job: Path,
    machine: L1,
    command: str,
    files: Sequence[Path],
    guests: Sequence[Path],
    timeout_s: float,
) -> None:
    """Fill the folder that is /mnt in L1."""
    python = job / _PYTHON
    _copy_packages(python)
    run_inside(
        machine.root, python, COMPILE_PYTHON, "compiling Python for L1", timeout_s, WHAT="/mnt"
    )
    modules = job / "modules"
    modules.mkdir()
    if machine.first is not None and (machine.kernel / SELFTESTS).is_dir():
        shutil.copytree(machine.kernel / SELFTESTS, job / SELFTESTS)
    for file in (*(machine.kernel / "modules").iterdir(), machine.module):
        shutil.copy(file, modules)
    for file in files:
        shutil.copy(file, job)
    cache = cache_folder()
    for guest in guests:
        folder = guest.parent.relative_to(cache)
        shutil.copytree(guest.parent, job / _CACHE / cache.name / folder)
    qemu = ""
    if machine.qemu:
        qemu = f"{_mount('qemu')}export {TESTED_QEMU}={TESTED_QEMU_PATH}\n"
    (job / "command").write_text(
        f"{_mount('python')}export PYTHONPATH=/run/python PYTHONDONTWRITEBYTECODE=1\n"
        f"export XDG_CACHE_HOME=/mnt/{_CACHE} {IN_L1}=1\n"
        f"{qemu}"
        f"for module in $(cat /mnt/modules/order) {MODULE}.ko; do\n"
        "    insmod /mnt/modules/$module || exit 3\n"
        "done\n"
        # Debian's kernel has configfs as a module, which L1's init runs too early for.
        "[ -d /sys/kernel/config/target ] || mount -t configfs configfs /sys/kernel/config || :\n"
        f"{command}\n"
    )


def _copy_packages(target: Path) -> None:
    """Copy dmaproof's Python packages with their C extensions, and qemu.qmp."""
    folders = {
        "dmaproof": Path(errors.__file__).parent,
        "qmp_tools": Path(__file__).parents[2],
        "qemu/qmp": qemu_qmp.folder(),
    }
    for name, folder in folders.items():
        ignored = shutil.ignore_patterns("__pycache__", "*.c", "guests")
        shutil.copytree(folder, target / name, ignore=ignored)
    for file in files(_DISTRIBUTION) or []:
        if file.name == "entry_points.txt":  # L1 finds its kinds of devices there
            metadata = Path(file.locate()).parent
            shutil.copytree(metadata, target / metadata.name)
    # The guests' sources are the keys of L1's cache of guests.
    shutil.copytree(sources(), target / "qmp_tools/guests")
    # An editable installation keeps the extensions elsewhere.
    for extension in (_core.__file__, _mapping.__file__, _userfault.__file__):
        shutil.copy(extension, target / "dmaproof")
