"""A Linux guest with a balloon that frees memory on a test's command (balloon_guest.c)."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.build import compile_c
from qmp_tools.guest.drivers import BALLOON
from qmp_tools.guest.initramfs import with_modules
from qmp_tools.guest.kernels import find_kernel
from support.foreign_pair import Pair

_TIMEOUT_S = 60.0
PAGE_BYTES = 4096
FREED_BYTES = 64 << 20  # as in balloon_guest.c
RAM = "196616K"
"""Not a multiple of 256 KiB: with such a size QEMU 7.2 loses what vCPUs write under TCG."""


MEMORY = {
    "memfd": f"memory-backend-memfd,id=ram0,size={RAM},share=on",
    "private": f"memory-backend-ram,id=ram0,size={RAM}",
}


def options(folder: Path) -> list[str]:
    """Return the QEMU options that boot the guest, except for its RAM.

    `folder` receives its init and initramfs.
    """
    kernel = find_kernel(X86_64, BALLOON.modules)
    compile_c([Path(__file__).with_suffix(".c")], folder / "init", "-static")
    modules = kernel.modules.load_order(BALLOON.modules)
    initramfs = folder / "initramfs"
    initramfs.write_bytes(with_modules((folder / "init").read_bytes(), modules))
    line = "socket,id=line,path={folder}/{side}-line,server=on,wait=off"
    return [
        *("-no-reboot", "-kernel", str(kernel.image), "-initrd", str(initramfs)),
        *("-append", "quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check"),
        *("-chardev", line, "-serial", "null", "-serial", "chardev:line"),
    ]


def free_while_migrating(pair: Pair) -> None:
    """Migrate a guest that frees memory during the migration.

    The guest frees the memory after all of its RAM has been sent, and QEMU discards it before the
    migration ends.
    """
    source = pair.monitors[0]
    with _line_of(pair) as line:
        _wait_for_word(line, b"ready")
        source.execute("migrate-set-parameters", downtime_limit=1, max_bandwidth=100 << 20)
        pair.begin_to_migrate()
        _wait_until(lambda: _syncs(pair) >= 2, "a second sync of the dirty bitmap")
        source.execute("migrate-set-parameters", max_bandwidth=8 << 20)
        before = _resident_bytes(pair.pids[0])
        line.sendall(b"f")
        _wait_for_word(line, b"freed")
        _wait_until(
            lambda: before - _resident_bytes(pair.pids[0]) >= FREED_BYTES // 2,
            "discarded memory on the source",
        )
    source.execute("migrate-set-parameters", downtime_limit=60_000, max_bandwidth=1 << 30)
    assert source.wait_for("query-migrate", "completed", "failed") == "completed"
    pair.monitors[1].wait_for("query-status", "paused")


def populated_after(pair: Pair, run: dict[str, int]) -> int:
    """Return the GPA of the first page after a run that is not zero on the source."""
    page = run["gpa"] // PAGE_BYTES + run["pages"]
    command = f"gpa2hva {page * PAGE_BYTES:#x}"
    text = pair.monitors[0].execute("human-monitor-command", command_line=command)
    position = int(text.split()[-1], 16)
    with Path(f"/proc/{pair.pids[0]}/mem").open("rb", buffering=0) as memory:
        while not any(os.pread(memory.fileno(), PAGE_BYTES, position)):
            position, page = position + PAGE_BYTES, page + 1
    return page * PAGE_BYTES


def _syncs(pair: Pair) -> int:
    ram = pair.monitors[0].execute("query-migrate").get("ram", {})
    return int(ram.get("dirty-sync-count", 0))


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def _line_of(pair: Pair) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(_TIMEOUT_S)
    line.connect(str(pair.folder / "source-line"))
    return line


def _wait_for_word(line: socket.socket, word: bytes) -> None:
    received = b""
    while word not in received:
        more = line.recv(4096)
        assert more, f"the guest has ended; expected {word!r}, got {received!r}"
        received += more


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
