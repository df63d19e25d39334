"""QMP with dmaproof's errors: every error names the QEMU, the command, and QEMU's message.

A `Monitor` executes commands. dmaproof's own is `Qmp`, a session over a socket. The others borrow
the connection of another client (`borrowed_monitor`, `libvirt_domain`).
"""

from __future__ import annotations

import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any

from dmaproof.errors import UntestableError, WaitTimeoutError, printable

from ..host.timeout import bounded
from . import qemu_qmp


class QmpError(UntestableError):
    """QEMU refused a command, or did not answer."""


class QmpRefusal(QmpError):  # noqa: N818  (QEMU works, and has refused)
    """QEMU refused a command; the message has QEMU's reason."""


class QmpClosedError(QmpError):
    """QEMU has closed the connection, usually because it ended."""


class QmpTimeoutError(QmpError, WaitTimeoutError):
    """QEMU has not answered in time."""


def version_text(version: Mapping[str, Any]) -> str:
    """Return the version of QMP's greeting or of its command query-version as text."""
    number = version["qemu"]
    text = f"{number['major']}.{number['minor']}.{number['micro']}"
    return printable(f"{text} {version['package']}".strip())


class Monitor(ABC):
    """A means of executing QMP commands.

    `name` is the QEMU's name in messages, such as 'source QEMU'. `timeout_s` bounds the wait for
    each answer.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.timeout_s = timeout_s

    @property
    @abstractmethod
    def version(self) -> str:
        """QEMU's version, with the packager's version if there is one: '7.2.22 Debian …'."""

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Execute `command`; underscores in argument names become hyphens.

        Returns:
            The answer's 'return' member.

        Raises:
            QmpRefusal: QEMU refused the command.
            QmpTimeoutError: QEMU does not answer in time.
            QmpClosedError: QEMU has closed the connection.
        """
        return await self._in_time(command, self._execute(command, _named(arguments)))

    async def _in_time(self, command: str, answer: Awaitable[Any]) -> Any:
        late = self._late(f"answered {command}", self.timeout_s)
        async with bounded(self.timeout_s, lambda: late):
            return await answer

    @abstractmethod
    async def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Execute `command`; raise a `QmpError`, or a `QmpRefusal` if QEMU refuses it."""

    def _late(self, what: str, timeout_s: float) -> QmpTimeoutError:
        return QmpTimeoutError(
            f"{self.name} has not {what} within {timeout_s:g} s; allow more time (--timeout), or "
            "check what QEMU is waiting for"
        )

    def _refusal(self, command: str, reason: object) -> QmpRefusal:
        return QmpRefusal(f"{self.name} refused {command}: {reason}")


def _named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


class Qmp(Monitor):
    """A QMP session over a socket.

    `greeting_s` (default: `timeout_s`) bounds the wait for the greeting.
    """

    def __init__(self, name: str, timeout_s: float, greeting_s: float | None = None) -> None:
        super().__init__(name, timeout_s)
        self._greeting_s = timeout_s if greeting_s is None else greeting_s
        self._client = qemu_qmp.QMPClient(name)

    async def connect(self, address: socket.socket | str) -> None:
        """Negotiate QMP on a connected socket, or on the socket at a path.

        Raises:
            QmpTimeoutError: QEMU sends no greeting in time.
            QmpError: QEMU ended before its greeting, for example because of a wrong command line.
        """
        try:
            late = self._late("sent a QMP greeting", self._greeting_s)
            async with bounded(self._greeting_s, lambda: late):
                await self._client.connect(address)
        except QmpTimeoutError:
            await self.close()
            raise
        # qemu.qmp 0.0.6 asserts that a new session still runs; QEMU may have ended at that moment.
        except (qemu_qmp.QMPError, OSError, EOFError, AssertionError) as error:
            await self.close()  # else qemu.qmp's reader may print an error to stderr later
            raise QmpError(f"{self.name} did not answer on QMP: {error}") from error

    async def execute_out_of_band(self, command: str, **arguments: Any) -> Any:
        """Execute `command` even while QEMU's main loop waits; few commands support that.

        Raises:
            QmpError: as for `execute`.
        """
        answer = self._execute(command, _named(arguments), out_of_band=True)
        return await self._in_time(command, answer)

    async def _execute(
        self, command: str, arguments: Mapping[str, Any], *, out_of_band: bool = False
    ) -> Any:
        try:
            return await self._client.execute(command, arguments, oob=out_of_band)
        except qemu_qmp.ExecuteError as error:
            raise self._refusal(command, error) from error
        except (qemu_qmp.QMPError, EOFError) as error:
            raise QmpClosedError(
                f"{self.name} closed its QMP connection before it answered {command}; look at its "
                "log"
            ) from error

    async def send_fd(self, fd: int, name: str) -> None:
        """Send QEMU a duplicate of `fd`, which its monitor then knows by `name`.

        Raises:
            QmpError: as for `execute`.
        """
        try:
            self._client.send_fd_scm(fd)
        except (qemu_qmp.QMPError, OSError) as error:
            raise QmpError(f"cannot send {self.name} a file descriptor: {error}") from error
        await self.execute("getfd", fdname=name)

    @property
    def version(self) -> str:
        """QEMU's version. The greeting has it, so it is known even after QEMU has ended."""
        assert self._client.greeting is not None, "not connected yet"
        return version_text(self._client.greeting.QMP.version)

    @contextlib.asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[qemu_qmp.EventListener]:
        """Listen for the events called `names`."""
        listener = qemu_qmp.EventListener(names=names)
        with self._client.listen(listener):
            yield listener

    async def close(self) -> None:
        """Disconnect; a QEMU that has ended already is not an error."""
        # qemu.qmp 0.0.6 raises a bare EOFError if QEMU closed the connection first.
        with contextlib.suppress(qemu_qmp.QMPError, EOFError, OSError):
            await self._client.disconnect()
