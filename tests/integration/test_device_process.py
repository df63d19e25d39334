"""The device process and its owner: commands that it refuses, and errors that it reports."""

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
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(theirs.fileno())]
    with ours, theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        ours.sendall(line + b"\n")
        _, told = process.communicate(timeout=900)
    assert process.returncode == 2
    assert told.startswith(b"dmaproof device: control socket: ")
    assert b"is not a command" in told
    assert len(told.splitlines()) == 1


def test_evidence_into_a_folder_that_does_not_exist_is_an_error_in_the_answer(
    tmp_path: Path,
) -> None:
    ours, theirs = socket.socketpair()
    peer, device_peer = socket.socketpair()
    command = [
        *(sys.executable, "-m", "dmaproof.vhost_user"),
        *("--control", str(theirs.fileno()), "--fd", f"a={device_peer.fileno()}"),
    ]
    fds = [theirs.fileno(), device_peer.fileno()]
    with ours, theirs, peer, device_peer:
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE)
        request = {"do": "evidence", "session": "a", "folder": str(tmp_path / "none")}
        ours.sendall(json.dumps(request).encode() + b"\n")
        theirs.close()
        with ours.makefile() as said:
            answer = next(it for line in said if (it := json.loads(line))["event"] == "evidence")
            ours.shutdown(socket.SHUT_RDWR)
        _, told = process.communicate(timeout=900)
    assert "No such file or directory" in answer["error"]
    assert (process.returncode, told) == (0, b"")


def test_a_device_whose_log_is_on_a_full_disk_reports_it_on_its_control_socket() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "dmaproof.vhost_user", "--control", str(theirs.fileno())]
    command += ["--device", "blk:file=/dev/full"]
    with ours, theirs, Path("/dev/full").open("w") as log:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=log)
        theirs.close()
        with ours.makefile() as said:
            (event,) = map(json.loads, said)
        assert process.wait(timeout=120) == 2
    assert event["event"] == "failed"
    assert "/dev/full is not a regular file" in event["message"]
