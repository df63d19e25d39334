"""QEMU's benchmark guestperf with the script of docs/guestperf.md, `watch` and `check`."""

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

from qmp_tools.guest.bare import probe_guest
from qmp_tools.qemu.builds import installed
from support.command import TIMEOUT_S, Tool
from support.qemu_source import qemu_source

PAGE = Path(__file__).parents[2] / "docs" / "guestperf.md"
SLEEP_S = 5


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
    if not installed():  # QEMU before 9.0 may lose pages of this guest under TCG
        pytest.skip("needs a newer QEMU: dmaproof qemu fetch 11.1")
    source = qemu_source()
    folder = tmp_path_factory.mktemp("g")
    script = re.search(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert script
    wrapper = write_script(folder / "qemu-for-guestperf", script[1])
    qemu = shlex.quote(str(installed()[-1].path))
    # guestperf demands KVM, which is not everywhere.
    write_script(
        folder / "qemu-system-x86_64",
        f"""#!/bin/sh
for word; do
    shift
    case $word in kvm) word=tcg ;; host) word=max ;; esac
    set -- "$@" "$word"
done
exec {qemu} "$@"
""",
    )
    guest = str(probe_guest())  # it has no initrd, but guestperf demands one
    program = str(source / "tests/migration-stress/guestperf.py")
    command = [sys.executable, program, "--verbose"]
    command += ["--binary", str(wrapper), "--kernel", guest, "--initrd", guest, "--mem", "0"]
    guestperf = subprocess.Popen(
        [*command, "--sleep", str(SLEEP_S)],
        cwd=folder,
        env={
            **os.environ,
            "TMPDIR": str(folder),
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    sockets = [folder / f"guestperf-{side}" for side in ("source", "destination")]
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
        checked = tool.run("check", *map(str, sockets))
        assert checked.exit_code == 0, checked.output + checked.errors
        assert "PASS: all pages are equal" in checked.output
        guestperf.send_signal(signal.SIGCONT)
        printed, _ = guestperf.communicate(timeout=TIMEOUT_S)
        assert guestperf.returncode == 0, printed
        assert "Finished migration" in printed
    finally:
        with contextlib.suppress(ProcessLookupError):  # else its QEMUs have ended, too
            os.killpg(guestperf.pid, signal.SIGKILL)
        guestperf.wait()
