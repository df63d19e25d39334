"""Runs one command in L1, and never hangs: L1 is a QEMU like any other of a run.

A folder of the run's is shared with L1 at /mnt: the command goes in there, and what it writes there
is outside when it is done. Lines that the command prints come out while it runs. Several machines
may run the same command side by side, with one /mnt, and share the work out among themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof import _core, _mapping, errors
from dmaproof.errors import UntestableError, WaitTimeoutError, printable

from ...host.process import log_tail
from ...qemu import qemu_qmp
from ...qemu.builds import PROGRAM as QEMU_PROGRAM
from ...qemu.machine import option_value
from ...qemu.qemu import OwnedQemu, running_qemu
from .kernel import KERNELS, MODULE, l1_kernel, l1_module
from .root import COMPILE_PYTHON, l1_root, run_inside
from .stock import STOCK, stock_kernel

_logger = logging.getLogger(__name__)

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
_PYTHON: Final = "python"
_TOLD_LINES: Final = 15
"""Of what a command has printed, in the error that tells of its failure."""


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


def l1(version: str = next(iter(KERNELS))) -> L1:
    """L1 with the kernel `version`, built the first time: some 6 minutes on two cores.

    Where that kernel cannot be built, L1 has Debian's stock one, as with `version` "stock".

    Raises:
        UntestableError: there is no L1 here at all; the message says what is missing.
    """
    root = l1_root()
    try:
        kernel = stock_kernel() if version == STOCK else l1_kernel(root, version)
    except UntestableError as error:
        if version == STOCK:
            raise
        _logger.warning(
            "%s\nso it has to be Debian's stock kernel, with which less can be proved", error
        )
        kernel = stock_kernel()
    return L1(root, kernel, l1_module(root, kernel))


async def run_in_l1(
    machine: L1,
    binary: Path,
    command: str,
    folder: Path,
    heard: Callable[[str], None],
    timeout_s: float,
    *,
    files: Sequence[Path] = (),
    machines: int = 1,
) -> Path:
    """Boot L1 with the QEMU `binary`, run the shell `command` in it, and wait for its end.

    The command finds our Python packages in PYTHONPATH, the kernel modules that L1 needs in
    /mnt/modules, `files` in /mnt, and in MACHINE which of so many `machines` side by side it runs
    in, from 1 on. `heard` is given each line that it prints. Returns the folder that was /mnt.
    `timeout_s` bounds the wait for each of these lines.

    Raises:
        WaitTimeoutError: a machine has gone silent. The others have been ended.
        UntestableError: a machine does not boot, or ends too early, or its command fails; the same.
    """
    job = folder / _JOB
    _fill(job, machine, command, files, timeout_s)
    running = [
        asyncio.ensure_future(run_machine(number, machine, binary, folder, heard, timeout_s))
        for number in range(1, machines + 1)
    ]
    try:
        await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return job


async def run_machine(
    number: int,
    machine: L1,
    binary: Path,
    folder: Path,
    heard: Callable[[str], None],
    timeout_s: float,
) -> None:
    """Run machine `number` of `run_in_l1`, whose /mnt is filled, to the end of its command.

    Raises:
        WaitTimeoutError, UntestableError: see `run_in_l1`.
    """
    job = folder / _JOB
    said: deque[str] = deque(maxlen=_TOLD_LINES)
    loop = asyncio.get_running_loop()
    arguments = _arguments(number, machine, job)
    async with running_qemu(
        f"L1-{number}", binary, arguments, folder, timeout_s=timeout_s
    ) as running:
        try:
            async with asyncio.timeout(timeout_s) as silence:
                async for line in _lines(running):
                    silence.reschedule(loop.time() + timeout_s)
                    said.append(f"    {line}")
                    heard(line)
                await running.process.died
        except TimeoutError:
            told = [f"L1 has said nothing for {timeout_s:g} s", *said, log_tail(running.console)]
            raise WaitTimeoutError("\n".join(told).rstrip()) from None
    try:
        code = int((job / f"exit-code-{number}").read_text())
    except (OSError, ValueError):
        raise UntestableError(
            f"L1 ended before its command did ({running.process.how_it_ended()})\n"
            f"{running.process.log_tail()}\n{log_tail(running.console)}".rstrip()
        ) from None
    if code:
        raise UntestableError("\n".join((f"L1's command ended with exit code {code}:", *said)))


async def _lines(running: OwnedQemu) -> AsyncIterator[str]:
    with contextlib.suppress(ConnectionError):
        while line := await running.report.readline():
            yield printable(line.decode(errors="replace").rstrip())


def _arguments(number: int, machine: L1, job: Path) -> list[str]:
    initramfs = machine.kernel / "initramfs"
    line = f"{_COMMAND_LINE} MACHINE={number}"
    if machine.counting:
        # Without what fills memory byte by byte: each byte would count as an instruction.
        cpu = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        cpu += ["-cpu", "max,erms=off,fsrm=off"]
    else:
        cpu = ["-accel", "tcg,thread=multi", "-smp", "2", "-cpu", "max"]
    return [
        *("-machine", "q35", *cpu, "-m", f"{machine.memory_mib}M", "-no-reboot"),
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
    """The shell's commands for what does not change, and may be kept in L1's memory."""
    where = f"/run/{tag}"
    return f"mkdir {where} && mount -t 9p -o {_SHARE},cache=loose,ro {tag} {where} || exit 3\n"


def _fill(job: Path, machine: L1, command: str, files: Sequence[Path], timeout_s: float) -> None:
    """What L1's command finds in /mnt."""
    python = job / _PYTHON
    _copy_packages(python)
    run_inside(
        machine.root, python, COMPILE_PYTHON, "compiling Python for L1", timeout_s, WHAT="/mnt"
    )
    modules = job / "modules"
    modules.mkdir()
    for file in (*(machine.kernel / "modules").iterdir(), machine.module):
        shutil.copy(file, modules)
    for file in files:
        shutil.copy(file, job)
    qemu = ""
    if machine.qemu:
        qemu = f"{_mount('qemu')}export {TESTED_QEMU}=/run/qemu/{QEMU_PROGRAM}\n"
    (job / "command").write_text(
        f"{_mount('python')}export PYTHONPATH=/run/python PYTHONDONTWRITEBYTECODE=1\n"
        f"{qemu}"
        f"for module in $(cat /mnt/modules/order) {MODULE}.ko; do\n"
        "    insmod /mnt/modules/$module || exit 3\n"
        "done\n"
        f"{command}\n"
    )


def _copy_packages(target: Path) -> None:
    """Copy our Python packages, with the C extension, and the one that they need."""
    folders = {
        "dmaproof": Path(errors.__file__).parent,
        "qmp_tools": Path(__file__).parents[2],
        "qemu/qmp": qemu_qmp.folder(),
    }
    for name, folder in folders.items():
        ignored = shutil.ignore_patterns("__pycache__", "*.c", "guests")
        shutil.copytree(folder, target / name, ignore=ignored)
    # An editable installation keeps the extensions elsewhere.
    for extension in (_core.__file__, _mapping.__file__):
        shutil.copy(extension, target / "dmaproof")
