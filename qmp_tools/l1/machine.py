"""Runs one command in L1, and never hangs: L1 is a QEMU like any other of a run.

The run's folder is shared with L1 at /mnt: the command goes in there, and what it writes there is
outside when it is done. Lines that the command prints come out while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import qemu.qmp

from dmaproof import _core, _mapping, errors
from dmaproof.errors import UntestableError

from ..guest.build import Say
from ..host.qemu_builds import PROGRAM as QEMU_PROGRAM
from ..processes.process import log_tail
from ..processes.qemu import Qemu
from .kernel import KERNELS, MODULE, l1_kernel, l1_module
from .root import COMPILE_PYTHON, l1_root, run_inside
from .stock import STOCK, stock_kernel

_SHARE: Final = "trans=virtio,version=9p2000.L,msize=512000"
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet panic=-1 nokaslr tsc=reliable no_timer_check "
    "transparent_hugepage=madvise iommufd.allow_unsafe_interrupts=1 "
    f"root=root rootfstype=9p rootflags={_SHARE},cache=loose "
    "ro init=/init"
)
TESTED_QEMU: Final = "DMAPROOF_TESTED_QEMU"
"""The variable by which L1's command finds a QEMU that is not the root file system's."""
_JOB: Final = "job"
_COMPILE_S: Final = 120.0


@dataclass(frozen=True)
class L1:
    """What L1 is made of."""

    root: Path
    kernel: Path
    module: Path
    qemu: Path | None = None
    """The folder of a fetched QEMU, which is there in L1 and named by `TESTED_QEMU`."""
    memory_mib: int = 2048
    counting: bool = False
    """Its clock counts instructions, one a nanosecond, on one CPU: the same everywhere."""


def l1(version: str = next(iter(KERNELS)), say: Say = lambda text: None) -> L1:
    """L1 with the kernel `version`, built the first time: some 6 minutes on two cores.

    Where that kernel cannot be built, L1 has Debian's stock one, as with `version` "stock".

    Raises:
        UntestableError: there is no L1 here at all; the message says what is missing.
    """
    root = l1_root(say)
    try:
        kernel = stock_kernel(say) if version == STOCK else l1_kernel(root, version, say)
    except UntestableError as error:
        if version == STOCK:
            raise
        say(f"{error}\nso it has to be Debian's stock kernel, with which less can be proved")
        kernel = stock_kernel(say)
    return L1(root, kernel, l1_module(root, kernel, say))


async def run_in_l1(
    machine: L1,
    binary: Path,
    command: str,
    folder: Path,
    heard: Callable[[str], None],
    timeout_s: float,
    *,
    files: Sequence[Path] = (),
) -> tuple[int, Path]:
    """Boot L1 with the QEMU `binary`, run the shell `command` in it, and wait for its end.

    The command finds our Python packages in PYTHONPATH, the kernel modules that L1 needs in
    /mnt/modules, and `files` in /mnt. `heard` is given each line that it prints. Returns its exit
    code and the folder that was its /mnt.

    Raises:
        UntestableError: L1 does not boot, ends too early, or takes longer than `timeout_s`.
    """
    job = folder / _JOB
    _fill(job, machine, command, files)
    running = await Qemu.start("L1", binary, _arguments(machine, job), folder)
    try:
        async with asyncio.timeout(timeout_s):
            reading = asyncio.ensure_future(_read(running, heard))
            await running.process.died
            await reading
    except TimeoutError:
        raise UntestableError(
            f"L1's command took longer than {timeout_s:.0f} s\n{log_tail(running.console)}".rstrip()
        ) from None
    finally:
        await running.end()
    try:
        return int((job / "exit-code").read_text()), job
    except (OSError, ValueError):
        raise UntestableError(
            f"L1 ended before its command did ({running.process.how_it_ended()})\n"
            f"{running.process.log_tail()}\n{log_tail(running.console)}".rstrip()
        ) from None


async def _read(running: Qemu, heard: Callable[[str], None]) -> None:
    with contextlib.suppress(ConnectionError):
        while line := await running.report.readline():
            heard(line.decode(errors="replace").rstrip())


def _arguments(machine: L1, job: Path) -> list[str]:
    initramfs = machine.kernel / "initramfs"
    if machine.counting:
        # Without what fills memory byte by byte: each byte would count as an instruction.
        cpu = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        cpu += ["-cpu", "max,erms=off,fsrm=off"]
    else:
        cpu = ["-accel", "tcg,thread=multi", "-smp", "2", "-cpu", "max"]
    return [
        *("-machine", "q35", *cpu, "-m", f"{machine.memory_mib}M", "-no-reboot"),
        *("-kernel", os.fspath(machine.kernel / "vmlinux"), "-append", _COMMAND_LINE),
        *(("-initrd", os.fspath(initramfs)) if initramfs.exists() else ()),
        *("-fsdev", f"local,id=root,path={machine.root},security_model=none,readonly=on"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
        *("-fsdev", f"local,id=job,path={job},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=job,mount_tag=job"),
        *(_share_qemu(machine.qemu) if machine.qemu else ()),
    ]


def _share_qemu(folder: Path) -> list[str]:
    return [
        *("-fsdev", f"local,id=qemu,path={folder},security_model=none,readonly=on"),
        *("-device", "virtio-9p-pci,fsdev=qemu,mount_tag=qemu"),
    ]


def _fill(job: Path, machine: L1, command: str, files: Sequence[Path]) -> None:
    """What L1's command finds in /mnt."""
    python = job / "python"
    _copy_packages(python)
    run_inside(
        machine.root, python, COMPILE_PYTHON, "compiling Python for L1", _COMPILE_S, WHAT="/mnt"
    )
    modules = job / "modules"
    modules.mkdir()
    for file in (*(machine.kernel / "modules").iterdir(), machine.module):
        shutil.copy(file, modules)
    for file in files:
        shutil.copy(file, job)
    mount = ""
    if machine.qemu:
        mount = (
            f"mkdir /run/qemu && mount -t 9p -o {_SHARE},cache=loose,ro qemu /run/qemu || exit 3\n"
            f"export {TESTED_QEMU}=/run/qemu/{QEMU_PROGRAM}\n"
        )
    (job / "command").write_text(
        "export PYTHONPATH=/mnt/python PYTHONDONTWRITEBYTECODE=1\n"
        f"{mount}"
        f"for module in $(cat /mnt/modules/order) {MODULE}.ko; do\n"
        "    insmod /mnt/modules/$module || exit 3\n"
        "done\n"
        f"{command}\n"
    )


def _copy_packages(target: Path) -> None:
    """Copy our Python packages, with the C extension, and the one that they need."""
    folders = {
        "dmaproof": Path(errors.__file__).parent,
        "qmp_tools": Path(__file__).parents[1],
        "qemu/qmp": Path(qemu.qmp.__file__).parent,
    }
    for name, folder in folders.items():
        ignored = shutil.ignore_patterns("__pycache__", "*.c", "guests")
        shutil.copytree(folder, target / name, ignore=ignored)
    # An editable installation keeps the extensions elsewhere.
    for extension in (_core.__file__, _mapping.__file__):
        shutil.copy(extension, target / "dmaproof")
