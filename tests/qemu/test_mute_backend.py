"""A timeout names a back end that does not answer, with the message and its log."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Final

import pytest

from dmaproof.errors import WaitTimeoutError
from qmp_tools.blocking import Environment
from qmp_tools.proof.options import ProofOptions
from support.command import Tool

MUTE: Final = Path(__file__).parents[1] / "back_ends" / "mute.py"
ACCEPTS_NOTHING: Final = (
    "import socket, sys, time; listener = socket.socket(socket.AF_UNIX); "
    "listener.bind(sys.argv[1]); listener.listen(); print('listening', flush=True); "
    "time.sleep(10**6)"
)
SILENT: Final = Path(__file__).parents[1] / "back_ends" / "silent.py"


@pytest.mark.parametrize(
    ("message", "how", "state"),
    [("SET_LOG_BASE", "stops", ", stopped"), ("GET_VRING_BASE", "hangs", "")],
)
def test_a_message_that_is_not_answered_is_named(message: str, how: str, state: str) -> None:
    command = shlex.join([sys.executable, str(MUTE), "{socket}", message, how])
    workload = "write_once=64,churn=16"
    options = ProofOptions(guest="bare", workload=workload, device_command=command, timeout=60)
    with Environment() as environment:
        proof = environment.start_proof(options)
        proof.source.qemu.qmp.timeout_s = 5
        with pytest.raises(WaitTimeoutError) as raised:
            proof.migrate()
    silent, late, *log = str(raised.value).splitlines()
    assert re.fullmatch(
        rf"source device \(PID \d+{state}\) has not answered {message}, and source QEMU "
        "waits for it",
        silent,
    )
    # The QMP session or the test channel, which holds the migration in precopy, waits first.
    channel = r"\S+ within 5 s; .*|on its test channel \(qtest\) within 60 s; .*"
    assert re.fullmatch(f"source QEMU has not answered ({channel})", late)
    assert log[:2] == ["  last lines of source-device.log:", f"    received {message}"]


def test_a_wait_is_as_long_as_the_command_line_says(tool: Tool) -> None:
    command = shlex.join([sys.executable, "-S", "-c", ACCEPTS_NOTHING, "{socket}"])
    options = ("--guest", "bare", "--device-command", command, "--timeout", "10", "--quiet")
    outcome = tool.run("prove", *options)
    assert outcome.exit_code == 3
    assert "has not answered GET_FEATURES, and " in outcome.errors
    assert "QEMU has not sent a QMP greeting within 10 s" in outcome.errors
    assert "last lines of source-device.log:\n    listening" in outcome.errors


def test_requests_that_a_back_end_does_not_complete_are_counted(tool: Tool) -> None:
    command = shlex.join([sys.executable, str(SILENT), "{socket}", "disk"])
    options = ("--guest", "bare", "--device-command", command, "--timeout", "10", "--quiet")
    outcome = tool.run("prove", *options)
    assert outcome.exit_code == 3
    assert "has not become ready within 10 s; " in outcome.errors
    assert re.search("and [1-9] are unanswered", outcome.errors)
    assert "last lines of source-device.log:\n    silent" in outcome.errors
