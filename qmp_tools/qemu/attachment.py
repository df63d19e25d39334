"""Attach to a third party's QEMU over its QMP socket.

The socket's peer credentials (SO_PEERCRED, unix(7)) name the process that listens. That process is
QEMU, unless a supervisor opened the socket for QEMU; callers that use `pid` must check.

If a path does not lead to a QMP monitor, the error says what the path leads to. `attach` peeks at
the server's first bytes without taking them from the socket: a QMP monitor sends a JSON object, a
human monitor its banner, and a monitor that serves another client nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import socket
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ..arguments import AnyPath, path_of, require
from ..host.timeout import DEFAULT_TIMEOUT_S
from .qemu import SocketQemu
from .qmp import Qmp, QmpError

_LOOKED_AT_BYTES: Final = 80
_HUMAN_BANNER: Final = re.compile(rb"QEMU \S+ monitor")  # monitor/hmp.c, monitor_event
_TCP_ADDRESS: Final = re.compile(r"(tcp:/{0,2})?(\[[^]]*\]|[^/:]*):\d+(,.*)?")
_SECOND_SOCKET: Final = "-qmp unix:PATH,server=on,wait=off"
_KINDS: Final = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a pipe"),
)
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class NotASocketError(UsageError):
    """The path does not lead to a Unix socket."""


class TcpAddressError(NotASocketError):
    """The argument is the address of a QMP server over TCP, not a path."""


class DomainNameError(NotASocketError):
    """The argument is a name, perhaps of a libvirt domain, not a path."""


class NoListenerError(UntestableError):
    """The socket exists, but no process listens at it."""


class HumanMonitorError(UsageError):
    """The socket belongs to a human monitor (HMP)."""


class NotQmpError(UsageError):
    """The server at the socket does not speak QMP."""


class NoGreetingError(QmpError):
    """The server accepts the connection but sends no QMP greeting."""


class LibvirtMonitorError(NoGreetingError):
    """The socket belongs to the monitor that libvirt itself uses."""


@contextlib.asynccontextmanager
async def attach(
    name: str, path: AnyPath, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[SocketQemu]:
    """Open a QMP session with a running QEMU that listens at `path`.

    Args:
        name: the name of the QEMU in messages.
        path: its QMP socket.
        timeout_s: the bound of the wait for each answer. A tenth of it bounds the wait for the
            greeting, which QEMU sends at once unless the socket serves another client.

    Yields:
        The QEMU.

    Raises:
        NotASocketError: `path` is not a socket; the subclasses say what it is.
        HumanMonitorError: a human monitor listens at `path`.
        NotQmpError: another kind of server listens at `path`.
        NoGreetingError: the server sends nothing; `LibvirtMonitorError` if libvirt uses the socket.
        UntestableError: this user may not open the socket, or no server listens.
    """
    require("name", name, str, "a name")
    require("timeout_s", timeout_s, (int, float), "seconds")
    path = path_of("path", path)
    greeting_s = timeout_s / 10
    connection = _connect(name, path, greeting_s)
    pid, _, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    qmp = Qmp(name, timeout_s, greeting_s)
    try:
        _require_qmp(name, path, await _first_words(connection, greeting_s))
        await qmp.connect(connection)
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise _no_greeting(name, path, f"within {greeting_s:g} s") from error
        if isinstance(error, QmpError | OSError):
            raise _no_greeting(name, path, f"({error})") from error
        raise
    try:
        yield SocketQemu(qmp, pid, path)
    finally:
        await qmp.close()


async def _first_words(connection: socket.socket, timeout_s: float) -> bytes:
    """Peek at the server's first bytes; they are empty if the server closes the connection.

    Raises:
        TimeoutError: the server sends nothing for `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        async with asyncio.timeout(timeout_s):
            await readable.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(_LOOKED_AT_BYTES, socket.MSG_PEEK)


def _require_qmp(name: str, path: Path, first_words: bytes) -> None:
    if _HUMAN_BANNER.search(first_words):
        raise HumanMonitorError(
            f"{name}: {path} is a human monitor (HMP), not a QMP monitor; start QEMU with "
            f"{_SECOND_SOCKET} as well, and name that socket"
        )
    if first_words and not first_words.startswith(b"{"):
        raise NotQmpError(
            f"{name}: the server at {path} does not speak QMP: expected a QMP greeting, got "
            f"{first_words!r}. Name the socket of QEMU's option {_SECOND_SOCKET}"
        )


def _no_greeting(name: str, path: Path, why: str) -> NoGreetingError:
    if _is_libvirts(path):
        return LibvirtMonitorError(
            f"{name}: {path} is the monitor that libvirt itself uses, and a QMP socket serves one "
            f"client at a time; give the URI of the domain instead: {_uri_of_domain(path)}"
        )
    return NoGreetingError(
        f"{name}: no QMP greeting from {path} {why}. A QMP socket serves one client at a time: end "
        f"the other client, or give QEMU a second socket ({_SECOND_SOCKET}). The socket of a guest "
        "agent or a console sends no greeting"
    )


def _is_libvirts(path: Path) -> bool:
    """Return whether `path` is a monitor socket of libvirt's (qemuProcessPrepareMonitorChr)."""
    return path.name == "monitor.sock" and path.parent.name.startswith("domain-")


def _uri_of_domain(monitor: Path) -> str:
    """Return the URI of the domain whose monitor has this path, …/domain-ID-NAME/monitor.sock.

    libvirt shortens long names in paths (virDomainDefGetShortName).
    """
    instance = "system" if monitor.is_relative_to("/var/lib/libvirt") else "session"
    return f"qemu:///{instance}/{monitor.parent.name.split('-', 2)[-1]}"


def _connect(name: str, path: Path, timeout_s: float) -> socket.socket:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _not_found(name, os.fspath(path)) from None
    except PermissionError as error:
        if _is_libvirts(path):
            raise _no_greeting(name, path, str(error)) from None
        raise UntestableError(
            f"{name}: this user may not access {path}; run dmaproof as its owner or as root"
        ) from None
    except OSError as error:  # a file where a folder should be, a name too long, a loop
        raise NotASocketError(f"{name}: {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        kind = next((kind for fits, kind in _KINDS if fits(mode)), "not a socket")
        raise NotASocketError(
            f"{name}: {path} is {kind}; expected the QMP socket of QEMU's option {_SECOND_SOCKET}"
        )
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)  # connect waits while the listener's queue is full
    try:
        connection.connect(os.fspath(path))
    except PermissionError as error:
        connection.close()
        if _is_libvirts(path):
            raise _no_greeting(name, path, str(error)) from None
        owner = owner_name(path.stat().st_uid)
        raise UntestableError(
            f"{name}: {path} belongs to user {owner}; run dmaproof as {owner} or as root"
        ) from None
    except (ConnectionError, TimeoutError, BlockingIOError) as error:
        connection.close()
        raise NoListenerError(f"{name}: no QEMU listens at {path} ({error})") from None
    except OSError as error:
        connection.close()
        raise UsageError(f"{name}: {path}: {error.strerror or error}") from None
    connection.setblocking(False)
    return connection


def _not_found(name: str, argument: str) -> NotASocketError:
    if _TCP_ADDRESS.fullmatch(argument):
        return TcpAddressError(
            f"{name}: {argument} is a TCP address; expected the path of a Unix socket, which also "
            f"identifies QEMU's process; start QEMU with {_SECOND_SOCKET} as well"
        )
    if argument.startswith("unix:"):
        path = argument.removeprefix("unix:").partition(",")[0]
        return NotASocketError(f"{name}: not found: {argument}; give only the path: {path}")
    if "/" not in argument:
        return DomainNameError(
            f"{name}: not found: {argument} in this folder. If {argument} is a libvirt domain, "
            f"give its URI: qemu:///system/{argument}, or qemu:///session/{argument}"
        )
    return NotASocketError(
        f"{name}: not found: {argument}; start QEMU with -qmp unix:{argument},server=on,wait=off"
    )


def owner_name(uid: int) -> str:
    """Return the user's name; the number if the user has no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
