"""What is told of sockets behind which there is no QEMU to talk to."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.processes.attachment import attach

VERSION = {"qemu": {"major": 9, "minor": 2, "micro": 1}, "package": "ours"}


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        server.listen(1)
        yield server


def attach_to(path: Path, timeout_s: float = 600) -> tuple[int, str]:
    async def attached() -> tuple[int, str]:
        async with attach("source QEMU", path, timeout_s=timeout_s) as qemu:
            return qemu.pid, qemu.version

    return asyncio.run(attached())


def test_a_socket_that_does_not_greet_is_busy(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with listener(path), pytest.raises(UntestableError, match=r"one client at a time.*-qmp unix:"):
        attach_to(path, timeout_s=1)


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with listener(path):
        pass
    with pytest.raises(UntestableError, match="no QEMU listens at"):
        attach_to(path)


def test_what_is_no_socket(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no .*start QEMU with -qmp"):
        attach_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is no socket"):
        attach_to(tmp_path)


def serve_version(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        greeting = {"QMP": {"version": VERSION, "capabilities": []}}
        connection.sendall(json.dumps(greeting).encode() + b"\n")
        # A client sends its next command when the last was answered, and ends it with no newline.
        while received := connection.recv(4096):
            command = json.loads(received)
            answer = {"return": VERSION if command["execute"] == "query-version" else {}}
            if "id" in command:
                answer["id"] = command["id"]
            connection.sendall(json.dumps(answer).encode() + b"\n")


def test_the_listening_process_is_known(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with listener(path) as server:
        thread = Thread(target=serve_version, args=(server,))
        thread.start()
        assert attach_to(path) == (os.getpid(), "9.2.1 ours")
        thread.join()
