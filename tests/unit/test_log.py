"""What is logged for people: where a command shows it, and that a library's user sees nothing."""

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
    logging.getLogger("a.stranger").warning("none of ours")
    return 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command line, whose every subcommand only logs."""

    def parser(words: list[str]) -> SimpleNamespace:
        quiet = "--quiet" in words
        return SimpleNamespace(
            parse_args=lambda words: argparse.Namespace(run=log_steps, quiet=quiet)
        )

    monkeypatch.setattr(command, "make_parser", parser)
    return lambda *words: main(words)


def test_a_command_shows_what_both_packages_log_as_lines_in_order(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    told = capsys.readouterr()
    assert told.err == "migrating (unix)\nthe package another has no such part\ncomparing\n"
    assert told.out == ""


def test_a_quiet_command_shows_nothing(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--quiet") == 0
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_any_more_when_a_command_is_over(
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


def test_of_many_proofs_only_new_facts_and_warnings_are_shown(
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


def test_errors_of_the_qmp_library_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_only_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StderrLog()
    assert log.on_progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert log.on_progress is not None
    log.is_quiet = True
    assert log.on_progress is None


def test_the_next_line_ends_the_bar(
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
