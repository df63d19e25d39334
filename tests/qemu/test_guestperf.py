"""QEMU's benchmark guestperf with the script of docs/qemu-tests.md, watched and checked."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.bare import probe_guest
from qmp_tools.qemu.builds import installed
from support.command import TIMEOUT_S, Tool
from support.qemu_source import qemu_source

PAGE = Path(__file__).parents[2] / "docs" / "qemu-tests.md"
SLEEP_S = 5

_TCG = """\
#!/bin/sh
# guestperf demands KVM, which not every machine has.
for word; do
    shift
    case $word in kvm) word=tcg ;; host) word=max ;; esac
    set -- "$@" "$word"
done
exec {qemu} "$@"
"""


def write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(process: subprocess.Popen[str], socket: Path) -> None:
    """Wait until guestperf has started the QEMU with this socket."""
    deadline = time.monotonic() + TIMEOUT_S
    while not socket.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"guestperf has started no QEMU with {socket}"
        time.sleep(0.05)


def test_guestperf_is_watched_and_its_ram_is_checked(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not installed(X86_64):  # QEMU before 9.0 may lose pages of this guest under TCG
        pytest.skip("needs a newer QEMU: dmaproof qemu fetch 11.1")
    source = qemu_source()
    folder = tmp_path_factory.mktemp("g")
    shown = re.search(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert shown
    script = shown[1].replace("unix:/tmp/", f"unix:{folder}/")
    assert script.count(str(folder)) == 2
    qemu = write_script(
        folder / "tcg", _TCG.format(qemu=shlex.quote(str(installed(X86_64)[-1].path)))
    )
    guest = str(probe_guest(X86_64))  # it has no initrd, but guestperf demands one
    guestperf = subprocess.Popen(
        [
            *(sys.executable, source / "tests/migration-stress/guestperf.py", "--verbose"),
            *("--binary", write_script(folder / "with-qmp-system-x86_64", script)),
            *("--kernel", guest, "--initrd", guest, "--mem", "0", "--sleep", str(SLEEP_S)),
            # QEMU makes hundreds of passes over this little RAM before it knows the bandwidth.
            *("--max-iters", str(10**6)),
        ],
        cwd=folder,
        env={**os.environ, "QEMU": str(qemu)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    sockets = [folder / "source.sock", folder / "destination.sock"]
    try:
        for socket in sockets:
            wait_for(guestperf, socket)
        # guestperf sleeps before and after the migration. While it is stopped, there is no hurry.
        guestperf.send_signal(signal.SIGSTOP)
        watch = tool.start("watch", str(sockets[0]), "--interval", "0.1")
        watch.wait_for_line("no migration yet")
        guestperf.send_signal(signal.SIGCONT)
        watched = watch.finish()
        guestperf.send_signal(signal.SIGSTOP)
        assert watched.exit_code == 0, watched.errors
        assert watched.output.splitlines()[-1].startswith("completed")
        checked = tool.run("check", *map(str, sockets), "--wait", "--resume")
        assert checked.exit_code == 0, checked.errors
        assert "all pages are equal" in checked.output
        guestperf.send_signal(signal.SIGCONT)
        printed, _ = guestperf.communicate(timeout=TIMEOUT_S)
        assert guestperf.returncode == 0, printed
        assert "Finished migration" in printed
    finally:
        with contextlib.suppress(ProcessLookupError):  # else its QEMUs have ended, too
            os.killpg(guestperf.pid, signal.SIGKILL)
        guestperf.wait()
