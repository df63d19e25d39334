"""Unexpected errors end with dmaproof's exit code and message, never with Python's exit code 1."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dmaproof import errors
from dmaproof.errors import DmaproofError, UntestableError
from qmp_tools.cli import prove
from qmp_tools.cli.display import print_table, print_text
from qmp_tools.cli.log import StderrLog
from qmp_tools.cli.main import main
from qmp_tools.host.cached_folder import fresh_folder
from qmp_tools.host.log import logging_to
from qmp_tools.host.process import log_tail
from qmp_tools.host.unexpected import CrashError, untestable
from qmp_tools.migration.migration import parse_progress

INIT = DmaproofError.__init__
ESCAPE = "\x1b]0;taken\x07\x1b[2J"


def test_a_cache_that_is_full_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UntestableError, match=rf"{tmp_path}.*No space left.*XDG_CACHE_HOME"),
        fresh_folder(tmp_path / "kind-digest"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_grow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "qemu.log"
    log.touch()
    assert log_tail(log) == ""
    there = os.statvfs(tmp_path)
    full = os.statvfs_result((*there[:3], 0, 0, *there[5:]))
    monkeypatch.setattr(os, "statvfs", lambda fd: full)
    assert f"no space left in {tmp_path}" in log_tail(log)


def of_a_bug(*arguments: object) -> NoReturn:
    raise KeyError(ESCAPE)


@pytest.mark.parametrize("raised", [KeyError("x"), ZeroDivisionError(), ConnectionResetError()])
def test_an_unexpected_exception_is_a_defect_in_dmaproof(raised: Exception) -> None:
    assert isinstance(untestable(raised), CrashError)


@pytest.mark.parametrize(
    ("raised", "reported"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/dev/x"), "/dev/x: Permission denied"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "out of memory"),
        (subprocess.TimeoutExpired(["cc"], 300), "'cc'"),
        (errors.TrackerError("EINVAL"), "EINVAL"),
    ],
)
def test_an_error_of_the_machine_is_not_a_defect_in_dmaproof(
    raised: Exception, reported: str
) -> None:
    reason = untestable(raised)
    assert not isinstance(reason, CrashError)
    assert reported in str(reason)


def test_a_crash_is_printed_with_its_traceback_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "proof.json"
    monkeypatch.setattr(prove, "given_options", of_a_bug)
    assert main(["prove", "--json", str(report)]) == 3
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("dmaproof: NOT TESTED: this is a defect in dmaproof (KeyError:")
    assert "Traceback" in rest[0]
    assert any("of_a_bug" in line for line in rest)
    assert ESCAPE[0] not in first + "".join(rest)
    answer: dict[str, Any] = json.loads(report.read_text())
    assert (answer["kind"], answer["exit_code"]) == ("prove-untested", 3)
    assert "KeyError" in answer["reason"]


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, DmaproofError) and kind.__init__ is INIT
    ],
)
def test_no_message_moves_the_terminal(kind: type[DmaproofError]) -> None:
    assert str(kind(f"QEMU said:\n\t{ESCAPE}")) == "QEMU said:\n\t\ufffd]0;taken\ufffd\ufffd[2J"


def test_nothing_shown_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(StderrLog()):
        logging.getLogger("qmp_tools").info(ESCAPE)
    print_text(ESCAPE)
    print_table(["device"], [[ESCAPE]])
    reported = capsys.readouterr()
    assert ESCAPE[0] not in reported.out + reported.err
    assert reported.out.count("taken") == 2
    failed = parse_progress({"status": "failed", "error-desc": ESCAPE})
    assert ESCAPE[0] not in f"{failed.error}"
