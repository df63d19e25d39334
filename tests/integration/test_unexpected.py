"""Errors of the machine and of other programs end with dmaproof's exit code and message."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from avocado.core.nrunner.runnable import Runnable

from dmaproof.errors import UntestableError
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.cli.main import main
from qmp_tools.guest.build import compile_c
from qmp_tools.host.run_folder import run_folder
from qmp_tools.integrations.avocado_plugins import ProofRunner
from qmp_tools.proof.options import ProofOptions
from qmp_tools.qemu import builds as qemu_builds

NEED_THE_CACHE = {
    "prove": ["prove", "--guest", "bare"],
    "prove with reports": ["prove", "--guest", "bare", "--json", "-"],
    "prove, a Linux guest": ["prove"],
    "prove, the fake device": ["prove", "--device", "vfio-fake"],
    "soak": ["soak"],
    "passthrough": ["passthrough"],
    "bench": ["bench", "kernel"],
}

ESCAPE = "\x1b]0;taken\x07\x1b[2J"


def without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def with_a_read_only_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc")  # root cannot write there either


@pytest.mark.parametrize("command", NEED_THE_CACHE.values(), ids=NEED_THE_CACHE)
@pytest.mark.parametrize("home", [without_a_home, with_a_read_only_home])
def test_without_a_cache_nothing_is_tested(
    home: Callable[[pytest.MonkeyPatch], None],
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home(monkeypatch)
    assert main(command) == 3
    reported = capsys.readouterr().err.splitlines()[-1]
    assert reported.startswith("dmaproof: NOT TESTED: ")
    assert "XDG_CACHE_HOME" in reported


def test_without_a_home_no_qemu_was_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_a_home(monkeypatch)
    assert qemu_builds.installed(X86_64) == []
    assert main(["qemu", "fetch", "11.1"]) == 3
    assert "XDG_DATA_HOME" in capsys.readouterr().err


def test_a_temporary_folder_that_is_full_is_named(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match=r"dmaproof-\w+: No space left.*TMPDIR"), run_folder():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UntestableError, match=r"/disk: Read-only.*TMPDIR"), run_folder() as folder:
        raise OSError(errno.EROFS, "Read-only file system", str(folder / "disk"))
    with pytest.raises(PermissionError), run_folder():
        raise PermissionError(errno.EACCES, "Permission denied", "/dev/kvm")


def of_a_bug(*arguments: object) -> NoReturn:
    raise KeyError(ESCAPE)


def test_a_failed_import_is_not_reported_as_a_loss() -> None:
    script = "import sys; sys.modules['numpy'] = None; from qmp_tools.cli.main import main; "
    command = [sys.executable, "-c", script + "sys.exit(main(['doctor']))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(
        "dmaproof: NOT TESTED: this is a defect in dmaproof (ModuleNotFound"
    )


def test_no_compiler_message_moves_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nprintf '\\033[31mred\\377' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UntestableError, match="\ufffd\\[31mred\ufffd"):
        compile_c([], tmp_path / "guest")


def test_avocados_runner_reports_an_unexpected_exception_as_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ProofOptions, "of", of_a_bug)
    started, finished = ProofRunner().run(Runnable("dmaproof", "a cell"))
    assert (started["status"], finished["status"]) == ("started", "finished")
    assert finished["result"] == "error"
    assert "this is a defect in dmaproof (KeyError" in finished["fail_reason"]
