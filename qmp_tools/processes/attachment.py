"""A QEMU that somebody else started, reached over its QMP socket.

The socket's peer credentials (SO_PEERCRED, unix(7)) name the process that listens, which is QEMU
unless a supervisor opened the socket for it; whoever uses `pid` has to make sure.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError

from .qmp import Qmp, QmpError
from .timeout import DEFAULT_TIMEOUT_S

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True)
class AttachedQemu:
    """A QMP session with a running QEMU; `pid` is 0 where the listener cannot be seen from here."""

    qmp: Qmp
    socket_path: Path
    pid: int
    version: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.qmp.name

    async def status(self) -> str:
        """The run state, such as 'running', 'paused' or 'postmigrate'."""
        answer: dict[str, Any] = await self.qmp.execute("query-status")
        return str(answer["status"])

    async def monitor(self, command: str) -> str:
        """What the human monitor prints for `command`."""
        return str(await self.qmp.execute("human-monitor-command", command_line=command))


@contextlib.asynccontextmanager
async def attach(
    name: str, path: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[AttachedQemu]:
    """A session with the QEMU, called `name`, that listens at `path`.

    `timeout_s` bounds the wait for each of its answers. The greeting comes at once, or never where
    the socket serves another client, so a tenth of that bounds the wait for it.

    Raises:
        UsageError: there is no socket at `path`.
        UntestableError: it may not be opened, nobody listens, or QEMU does not greet.
    """
    greeting_s = timeout_s / 10
    connection = _connect(name, path, greeting_s)
    pid, _, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    qmp = Qmp(name, timeout_s, greeting_s)
    try:
        await qmp.connect(connection)
    except QmpError as error:
        connection.close()
        raise QmpError(
            f"{name}: no QMP greeting from {path} within {greeting_s:g} s. A QMP socket "
            "serves one client at a time: end the other client, or give QEMU a second socket "
            "(-qmp unix:PATH,server=on,wait=off)"
        ) from error
    try:
        yield AttachedQemu(qmp, path, pid, await qmp.version())
    finally:
        await qmp.close()


def _connect(name: str, path: Path, timeout_s: float) -> socket.socket:
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise UsageError(f"{name}: {path} is no socket; a QMP socket is due")
    except FileNotFoundError:
        raise UsageError(
            f"{name}: there is no {path}; start QEMU with -qmp unix:{path},server=on,wait=off"
        ) from None
    except PermissionError:
        raise UntestableError(f"{name}: {path} is out of reach of this user") from None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)  # connect waits while the listener's queue is full
    try:
        connection.connect(os.fspath(path))
    except PermissionError:
        connection.close()
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


def owner_name(uid: int) -> str:
    """The user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
