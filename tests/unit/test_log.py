"""The log for people: where a command prints it, and that the library prints nothing."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qmp_tools.cli import main as command
from qmp_tools.cli.log import OfManyProofs, StderrLog
from qmp_tools.cli.main import main
from qmp_tools.host.log import logging_to
from qmp_tools.migration.migration import parse_progress
from qmp_tools.migration.progress_log import ProgressLog
from qmp_tools.qemu import qemu_qmp

PROGRESS = parse_progress({"status": "active", "ram": {"total": 4 << 20, "remaining": 1 << 20}})
STEPS = logging.getLogger("qmp_tools.proof.run")


def log_steps(arguments: argparse.Namespace) -> int:
    STEPS.info("migrating (%s)", "unix")
    logging.getLogger("dmaproof.discovery").warning("the package another has no such part")
    logging.getLogger("qmp_tools.migration.pair").info("comparing")
    logging.getLogger("third.party").warning("a third-party warning")
    return 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command line, each subcommand of which only logs."""

    def parser(chosen: list[str]) -> SimpleNamespace:
        return SimpleNamespace(
            parse_args=lambda words: argparse.Namespace(run=log_steps, quiet="--quiet" in words)
        )

    monkeypatch.setattr(command, "make_parser", parser)
    return lambda *words: main(words)


def test_a_command_prints_the_records_of_both_packages_as_lines_in_order(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    printed = capsys.readouterr()
    assert printed.err == "migrating (unix)\nthe package another has no such part\ncomparing\n"
    assert printed.out == ""


def test_a_quiet_command_prints_nothing(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--quiet") == 0
    assert capsys.readouterr().err == ""


def test_nothing_is_printed_after_a_command_has_ended(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("qmp_tools", "dmaproof"):
        caplog.set_level(logging.ERROR, name)
    run()
    capsys.readouterr()
    STEPS.error("later")
    assert capsys.readouterr().err == ""
    assert logging.getLogger("qmp_tools").level == logging.ERROR
    assert logging.getLogger("dmaproof").level == logging.ERROR


def test_only_new_facts_and_warnings_of_many_proofs_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = StderrLog()
    log.addFilter(OfManyProofs())
    with logging_to(log):
        for number in (1, 2):
            logging.getLogger("qmp_tools.proof.probes").info("accelerator: %s", "TCG")
            STEPS.info("comparing every page of RAM")
            logging.getLogger("qmp_tools.migration.progress_log").info("migration active")
            logging.getLogger("qmp_tools.migration.pair").warning("a step's warning")
            logging.getLogger("qmp_tools.proof.soak").info("migration %d", number)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["accelerator: TCG", "a step's warning", "migration 1", "migration 2"]


def test_errors_of_the_qmp_library_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(StderrLog()):
        qemu_qmp.QMPClient.logger.error("Task.Reader: end-of-file")
    assert capsys.readouterr().err == ""


def test_progress_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qmp_tools")
    now_s = [7.0]
    log = ProgressLog(lambda: now_s[0])
    for now_s[0] in (7.0, 7.9, 8.0, 8.9, 9.0):
        log(PROGRESS)
    assert caplog.messages == [f"migration active: {PROGRESS.summary}"] * 3


def test_only_a_terminal_gets_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StderrLog()
    assert log.on_progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert log.on_progress is not None
    log.is_quiet = True
    assert log.on_progress is None


def test_the_next_line_ends_the_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    log = StderrLog()
    with logging_to(log):
        assert log.on_progress is not None
        log.on_progress(PROGRESS)
        assert "precopy" in capsys.readouterr().err
        STEPS.info("comparing every page of RAM")
        shown = capsys.readouterr().err
        assert "\x1b[?25h" in shown.removesuffix("comparing every page of RAM\n")
        STEPS.info("continuing")
        assert capsys.readouterr().err == "continuing\n"
