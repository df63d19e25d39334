"""Run tests of this folder's test provider with avocado-vt, without ``avocado vt-bootstrap``.

    python tests/avocado_vt_provider/run.py good.once.checked [option of avocado run …]

avocado-vt keeps its files below HOME, so it gets a temporary one. It needs no guest image, no
network and no KVM.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.bare import probe_guest
from qmp_tools.host.user_folders import cache_folder

PROVIDER: Final = Path(__file__).parent.absolute()
_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_TIMEOUT_S: Final = 800


def set_up(home: Path, qemu: str) -> None:
    """Write what ``avocado vt-bootstrap`` would write, and avocado's configuration."""
    program = home / "qemu"
    # To see what QEMU can do, avocado-vt runs "echo -e 'quit' | qemu" with sh. dash, Debian's sh,
    # prints the -e too, and avocado-vt waits ten seconds for QEMU to end.
    program.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"*'-monitor stdio'* | *'-qmp stdio'*) sed 's/^-e //' | {qemu} \"$@\" ;;\n"
        f'*) exec {qemu} "$@" ;;\nesac\n'
    )
    program.chmod(0o755)
    providers = home / "avocado/data/avocado-vt/virttest/test-providers.d"
    # avocado-vt's options exist only if a provider has been downloaded.
    (providers / "downloads" / "none").mkdir(parents=True)
    (providers / "dmaproof.ini").write_text(
        f"[provider]\nuri: file://{PROVIDER}\n[qemu]\nsubdir: qemu/\n"
    )
    config = home / ".config/avocado/avocado.conf"
    config.parent.mkdir(parents=True)
    config.write_text(
        f"[vt]\nconfig = {PROVIDER}/subtests.cfg\n"
        f"[vt.qemu]\nqemu_bin = {program}\nqemu_dst_bin = {program}\n"
        f"[plugins.vtjoblock]\ndir = {home}\n"
    )


def wait_for(process: int) -> int:
    """Return the exit code of `process`, and reap also the QEMUs, which avocado-vt detaches.

    avocado-vt waits a minute for a QEMU that has ended and is not reaped.
    """
    while True:
        ended, status = os.wait()
        if ended == process:
            return os.waitstatus_to_exitcode(status)


def end_processes() -> None:
    """End all processes that are left."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError(f"the tests have not ended within {_TIMEOUT_S} s")


def main() -> int:
    """Run the tests, and return avocado's exit code."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("qemu-system-x86_64 not found: apt-get install qemu-system-x86")
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as folder:  # short, for sockets
        set_up(Path(folder), qemu)
        command = [sys.executable, "-m", "avocado", "run", "--max-parallel-tasks", "1"]
        command += ["--disable-sysinfo", "--vt-extra-params", f"kernel={probe_guest(X86_64)}"]
        command += ["--job-results-dir", str(Path.cwd() / "job-results"), *sys.argv[1:]]
        environment = {
            "HOME": folder,
            "TMPDIR": folder,
            "XDG_CACHE_HOME": str(cache_folder().parent),
            # avocado-vt finds its helpers only there.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        signal.signal(signal.SIGALRM, _too_late)
        signal.alarm(_TIMEOUT_S)
        try:
            return wait_for(os.posix_spawn(sys.executable, command, {**os.environ, **environment}))
        finally:
            end_processes()


if __name__ == "__main__":
    sys.exit(main())
