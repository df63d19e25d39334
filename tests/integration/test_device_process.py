"""The device process and its parent: commands that it refuses, and errors that it reports."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b"{}",
        b'{"do": "dance"}',
        b'{"do": "evidence"}',
        b'{"do": "evidence", "session": 1, "folder": null}',
    ],
)
def test_an_unknown_command_ends_the_process(line: bytes) -> None:
    control, device_end = socket.socketpair()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(device_end.fileno())]
    with control, device_end:
        process = subprocess.Popen(command, pass_fds=[device_end.fileno()], stderr=subprocess.PIPE)
        control.sendall(line + b"\n")
        _, errors = process.communicate(timeout=900)
    assert process.returncode == 2
    assert errors.startswith(b"dmaproof device: control socket: ")
    assert b"is not a command" in errors
    assert len(errors.splitlines()) == 1


def test_evidence_into_a_missing_folder_is_answered_with_an_error(
    tmp_path: Path,
) -> None:
    control, device_end = socket.socketpair()
    peer, device_peer = socket.socketpair()
    command = [
        *(sys.executable, "-m", "dmaproof.vhost_user"),
        *("--control", str(device_end.fileno()), "--fd", f"a={device_peer.fileno()}"),
    ]
    fds = [device_end.fileno(), device_peer.fileno()]
    with control, device_end, peer, device_peer:
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE)
        request = {"do": "evidence", "session": "a", "folder": str(tmp_path / "none")}
        control.sendall(json.dumps(request).encode() + b"\n")
        device_end.close()
        with control.makefile() as events:
            answer = next(
                event for event in map(json.loads, events) if event["event"] == "evidence"
            )
            control.shutdown(socket.SHUT_RDWR)
        _, errors = process.communicate(timeout=900)
    assert "No such file or directory" in answer["error"]
    assert (process.returncode, errors) == (0, b"")


def test_a_device_whose_log_is_on_a_full_disk_reports_it_on_its_control_socket() -> None:
    control, device_end = socket.socketpair()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(device_end.fileno())]
    command += ["--device", "blk:file=/dev/full"]
    with control, device_end, Path("/dev/full").open("w") as log:
        process = subprocess.Popen(command, pass_fds=[device_end.fileno()], stderr=log)
        device_end.close()
        with control.makefile() as events:
            (event,) = map(json.loads, events)
        assert process.wait(timeout=120) == 2
    assert event["event"] == "failed"
    assert "/dev/full is not a regular file" in event["message"]
