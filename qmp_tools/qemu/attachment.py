"""A QEMU that somebody else started, reached over its QMP socket.

The socket's peer credentials (SO_PEERCRED, unix(7)) name the process that listens, which is QEMU
unless a supervisor opened the socket for it; whoever uses its `pid` has to make sure.

A path that does not lead to a QMP monitor is reported as what it is. What a server says first is
looked at without being taken from the socket: a QMP monitor opens with a JSON object, a human
monitor with its banner, and a monitor that another client uses says nothing.
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
from .qemu import Qemu
from .qmp import Qmp, QmpError

_LOOKED_AT_BYTES: Final = 80
_HUMAN_BANNER: Final = re.compile(rb"QEMU \S+ monitor")  # monitor/hmp.c, monitor_event
_TCP_ADDRESS: Final = re.compile(r"(tcp:/{0,2})?(\[[^]]*\]|[^/:]*):\d+(,.*)?")
_SECOND_SOCKET: Final = "-qmp unix:PATH,server=on,wait=off"
_SECOND_SOCKET_OF_DOMAIN: Final = (
    f"give the domain a QMP socket of its own ({_SECOND_SOCKET} in <qemu:commandline>, see "
    "docs/check.md) and name that socket"
)
_KINDS: Final = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a pipe"),
)
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class NotASocketError(UsageError):
    """What was given does not lead to a Unix socket."""


class TcpAddressError(NotASocketError):
    """What was given is an address of QMP over TCP."""


class DomainNameError(NotASocketError):
    """What was given is a name, perhaps of a libvirt domain, and not a path."""


class HumanMonitorError(UsageError):
    """The socket is a human monitor's (HMP)."""


class NotQmpError(UsageError):
    """A server answers at the socket that does not speak QMP."""


class NoGreetingError(QmpError):
    """The server accepts the connection and does not greet."""


class LibvirtMonitorError(NoGreetingError):
    """The socket is the monitor that libvirt itself uses."""


@contextlib.asynccontextmanager
async def attach(
    name: str, path: AnyPath, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[Qemu]:
    """A session with the QEMU, called `name`, that listens at `path`.

    `timeout_s` bounds the wait for each of its answers. The greeting comes at once, or never where
    the socket serves another client, so a tenth of that bounds the wait for it.

    Raises:
        NotASocketError: there is no socket at `path`; its subclasses say what was given instead.
        HumanMonitorError: a human monitor listens there.
        NotQmpError: something else listens there.
        NoGreetingError: the server says nothing; `LibvirtMonitorError` where libvirt uses it.
        UntestableError: it may not be opened, or nobody listens.
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
        yield Qemu(qmp, pid, path)
    finally:
        await qmp.close()


async def _first_words(connection: socket.socket, timeout_s: float) -> bytes:
    """What the server says first, which stays in the socket; empty where it closes.

    Raises:
        TimeoutError: it says nothing for `timeout_s`.
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
            f"{name}: {path} is a human monitor (HMP), not a QMP monitor: start QEMU with "
            f"{_SECOND_SOCKET} too, and name that socket"
        )
    if first_words and not first_words.startswith(b"{"):
        raise NotQmpError(
            f"{name}: the server at {path} does not speak QMP; instead of a QMP greeting it sent "
            f"{first_words!r}. Name the socket of QEMU's option {_SECOND_SOCKET}"
        )


def _no_greeting(name: str, path: Path, why: str) -> NoGreetingError:
    if _is_libvirts(path):
        return LibvirtMonitorError(
            f"{name}: {path} is the monitor that libvirt itself uses, and a QMP socket serves one "
            f"client at a time: {_SECOND_SOCKET_OF_DOMAIN}"
        )
    return NoGreetingError(
        f"{name}: no QMP greeting from {path} {why}. A QMP socket serves one client at a time: end "
        f"the other client, or give QEMU a second socket ({_SECOND_SOCKET}). A guest agent's "
        "socket or a console's never greets"
    )


def _is_libvirts(path: Path) -> bool:
    """Whether it is named as libvirt names its monitors (qemuProcessPrepareMonitorChr)."""
    return path.name == "monitor.sock" and path.parent.name.startswith("domain-")


def _connect(name: str, path: Path, timeout_s: float) -> socket.socket:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _not_there(name, os.fspath(path)) from None
    except PermissionError as error:
        if _is_libvirts(path):
            raise _no_greeting(name, path, str(error)) from None
        raise UntestableError(f"{name}: {path} is out of reach of this user") from None
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
            f"{name}: {path} belongs to user {owner}; run this as {owner} or as root"
        ) from None
    except (ConnectionError, TimeoutError, BlockingIOError) as error:
        connection.close()
        raise UntestableError(f"{name}: no QEMU listens at {path} ({error})") from None
    except OSError as error:
        connection.close()
        raise UsageError(f"{name}: {path}: {error.strerror or error}") from None
    connection.setblocking(False)
    return connection


def _not_there(name: str, given: str) -> NotASocketError:
    if _TCP_ADDRESS.fullmatch(given):
        return TcpAddressError(
            f"{name}: {given} is a TCP address; expected the path of a Unix socket, which also "
            f"tells the process behind it: start QEMU with {_SECOND_SOCKET} too"
        )
    if given.startswith("unix:"):
        path = given.removeprefix("unix:").partition(",")[0]
        return NotASocketError(f"{name}: there is no file {given}; name the path alone: {path}")
    if "/" not in given:
        return DomainNameError(
            f"{name}: there is no file {given} here. If {given} is a libvirt domain: expected the "
            f"path of a QMP socket, not a domain's name; {_SECOND_SOCKET_OF_DOMAIN}"
        )
    return NotASocketError(
        f"{name}: there is no {given}; start QEMU with -qmp unix:{given},server=on,wait=off"
    )


def owner_name(uid: int) -> str:
    """The user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
