"""The errors for sockets that do not lead to a QMP monitor of QEMU."""

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

from dmaproof.errors import UntestableError
from qmp_tools.qemu.attachment import (
    DomainNameError,
    HumanMonitorError,
    LibvirtMonitorError,
    NoGreetingError,
    NotASocketError,
    NotQmpError,
    TcpAddressError,
    attach,
)

VERSION = {"qemu": {"major": 9, "minor": 2, "micro": 1}, "package": "test"}


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


def test_a_socket_without_a_greeting_is_reported_as_busy(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    message = r"no QMP greeting from .*/qmp within 0\.1 s.*one client at a time.*-qmp unix:"
    with listener(path), pytest.raises(NoGreetingError, match=message) as raised:
        attach_to(path, timeout_s=1)
    assert not isinstance(raised.value, LibvirtMonitorError)


def test_libvirts_monitor_is_recognized_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "domain-3-vm" / "monitor.sock"
    path.parent.mkdir()
    with (
        listener(path),
        pytest.raises(LibvirtMonitorError, match=r"libvirt .* qemu:///session/vm$"),
    ):
        attach_to(path, timeout_s=1)


@contextmanager
def serving(path: Path, words: bytes) -> Iterator[None]:
    """Run a server that sends `words` to its first client, and closes the connection."""

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(words)

    with listener(path) as server:
        thread = Thread(target=serve, args=(server,))
        thread.start()
        yield
        thread.join()


HMP = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (HMP, HumanMonitorError, r"human monitor \(HMP\).*start QEMU with -qmp unix:"),
        (b"\xff\xfb\x01" + HMP, HumanMonitorError, "human monitor"),  # with telnet=on
        (b"SSH-2.0-OpenSSH_9.2", NotQmpError, r"does not speak QMP.*SSH-2\.0.*-qmp unix:"),
        (b"", NoGreetingError, "no QMP greeting"),
        (b"{}\n", NoGreetingError, "no QMP greeting"),
    ],
)
def test_a_server_that_does_not_speak_qmp(
    tmp_path: Path, words: bytes, kind: type[Exception], message: str
) -> None:
    path = tmp_path / "socket"
    with serving(path, words), pytest.raises(kind, match=message):
        attach_to(path)


def test_a_socket_without_a_listener_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with listener(path):
        pass
    with pytest.raises(UntestableError, match="no QEMU listens at"):
        attach_to(path)


def test_a_path_that_is_not_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotASocketError, match=r"not found: .*; start QEMU with -qmp"):
        attach_to(tmp_path / "nothing")
    with pytest.raises(NotASocketError, match=r"is a folder; expected .*-qmp"):
        attach_to(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotASocketError, match="is a regular file"):
        attach_to(file)
    with pytest.raises(NotASocketError, match="Not a directory"):
        attach_to(file / "qmp")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(NotASocketError, match="is a pipe"):
        attach_to(pipe)
    with pytest.raises(NotASocketError, match="is a character device"):
        attach_to(Path("/dev/null"))


@pytest.mark.parametrize("given", ["localhost:4444", "tcp:[::1]:4444", "tcp::4444,server=on"])
def test_a_tcp_address_is_refused(given: str) -> None:
    with pytest.raises(TcpAddressError, match=r"TCP address; expected .*Unix socket.*-qmp unix:"):
        attach_to(Path(given))


def test_a_name_without_a_slash_may_be_a_libvirt_domain() -> None:
    with pytest.raises(DomainNameError, match=r"libvirt domain, give its URI: .*/my-vm,"):
        attach_to(Path("my-vm"))


def test_a_socket_address_in_qemus_form_is_refused() -> None:
    with pytest.raises(NotASocketError, match=r"give only the path: /run/no-qmp$"):
        attach_to(Path("unix:/run/no-qmp,server=on"))


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
        assert attach_to(path) == (os.getpid(), "9.2.1 test")
        thread.join()
