"""The emulated arm64 machine: QEMU under TCG, with its output on the serial port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from .kernel import Kernel

# A CPU with all three page sizes, and without SVE, which is slow under TCG.
_CPU: Final = "neoverse-n1"
_CPUS: Final = 2
_MEMORY: Final = "4G"
_COMMAND_LINE: Final = (
    "console=ttyAMA0 quiet loglevel=4 panic=-1 random.trust_cpu=on mitigations=off"
)
_EXIT_CODE: Final = re.compile(r"arm64 host: exit code (\d+)")


def run_machine(
    kernel: Kernel,
    system: Path,
    files: Path,
    folder: Path,
    timeout_s: float,
    on_line: Callable[[str], None],
) -> int:
    """Boot the machine, and return the exit code of what runs in it.

    Args:
        kernel: the kernel.
        system: the image of the root file system, which does not change.
        files: a tar archive for the folder /root.
        folder: a folder for what the machine writes to its disk.
        timeout_s: the machine is killed after this time.
        on_line: called with each line of the machine's output.

    Raises:
        UntestableError: the machine has not reported an exit code.
    """
    disk = "if=none,format=raw,cache=unsafe,discard=unmap"
    command: list[str | Path] = [
        *("setpriv", "--pdeathsig", "KILL"),
        *("qemu-system-aarch64", "-nodefaults", "-nographic", "-no-reboot"),
        *("-machine", "virt", "-cpu", _CPU, "-smp", str(_CPUS), "-m", _MEMORY),
        *("-accel", "tcg,thread=multi"),
        *("-kernel", kernel.image, "-initrd", kernel.initramfs, "-append", _COMMAND_LINE),
        *("-drive", f"file={system},id=system,snapshot=on,{disk}"),
        *("-drive", f"file={files},id=files,readonly=on,{disk}"),
        # The first device of a virt machine has the highest address and would become the second.
        *("-device", "virtio-blk-pci,drive=system,addr=1,romfile="),
        *("-device", "virtio-blk-pci,drive=files,addr=2,romfile="),
        *("-serial", "stdio"),
    ]
    try:
        machine = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise UntestableError(f"{error.filename} is not installed") from None
    clock = threading.Timer(timeout_s, machine.send_signal, [signal.SIGKILL])
    clock.start()
    found: str | None = None
    try:
        assert machine.stdout is not None
        for line in machine.stdout:
            on_line(line)
            if match := _EXIT_CODE.match(line):
                found = match[1]
        machine.wait()
    finally:
        machine.kill()
        machine.wait()
        clock.cancel()
    if found is None:
        raise UntestableError(
            f"the emulated machine ended without a result (limit: {timeout_s / 60:.0f} minutes)"
        )
    return int(found)
