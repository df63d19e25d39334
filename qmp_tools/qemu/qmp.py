"""QMP with errors of ours: every failure names the QEMU, the command, and what QEMU said."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

from dmaproof.errors import UntestableError, WaitTimeoutError, printable

from ..host.timeout import bounded
from . import qemu_qmp


class QmpError(UntestableError):
    """QEMU refused a command, or did not answer."""


class QmpRefusal(QmpError):  # noqa: N818  (QEMU is well, and has said no)
    """QEMU refused a command; the message has its words."""


class QmpTimeoutError(QmpError, WaitTimeoutError):
    """QEMU has not answered in time."""


class Qmp:
    """A QMP session. `name` is what messages call the QEMU: 'source QEMU'.

    `timeout_s` bounds the wait for each answer, and for the greeting too unless that has a
    `greeting_s` of its own.
    """

    def __init__(self, name: str, timeout_s: float, greeting_s: float | None = None) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self._greeting_s = timeout_s if greeting_s is None else greeting_s
        self._client = qemu_qmp.QMPClient(name)

    async def connect(self, address: socket.socket | str) -> None:
        """Negotiate QMP on a connected socket, or on the one at a path.

        Raises:
            QmpTimeoutError: QEMU does not greet in time.
            QmpError: QEMU is not there; with a wrong command line it ends before it greets.
        """
        try:
            late = self._late("greeted on QMP", self._greeting_s)
            async with bounded(self._greeting_s, lambda: late):
                await self._client.connect(address)
        except QmpTimeoutError:
            await self.close()
            raise
        except (qemu_qmp.QMPError, OSError, EOFError) as error:
            await self.close()  # or qemu.qmp's reader may complain later, on stderr
            raise QmpError(f"{self.name} did not answer on QMP: {error}") from error

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Execute `command`; underscores in argument names become hyphens.

        Raises:
            QmpRefusal: QEMU refused it.
            QmpTimeoutError: QEMU does not answer in time.
            QmpError: QEMU has gone.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            late = self._late(f"answered {command}", self.timeout_s)
            async with bounded(self.timeout_s, lambda: late):
                return await self._client.execute(command, named)
        except qemu_qmp.ExecuteError as error:
            raise QmpRefusal(f"{self.name} refused {command}: {error}") from error
        except (qemu_qmp.QMPError, EOFError) as error:
            raise QmpError(f"{self.name} went away during {command}") from error

    def _late(self, what: str, timeout_s: float) -> QmpTimeoutError:
        return QmpTimeoutError(f"{self.name} has not {what} within {timeout_s:g} s")

    async def send_fd(self, fd: int, name: str) -> None:
        """Give QEMU a duplicate of `fd`, which its monitor then knows by `name`.

        Raises:
            QmpError: as for `execute`.
        """
        try:
            self._client.send_fd_scm(fd)
        except (qemu_qmp.QMPError, OSError) as error:
            raise QmpError(f"{self.name} took no file descriptor: {error}") from error
        await self.execute("getfd", fdname=name)

    @property
    def version(self) -> str:
        """QEMU's version, with its packager's where it has one: '7.2.22 Debian …'.

        The greeting has it, so a QEMU that has ended is still known by it.
        """
        assert self._client.greeting is not None, "not connected yet"
        answer: Mapping[str, Any] = self._client.greeting.QMP.version
        number = answer["qemu"]
        text = f"{number['major']}.{number['minor']}.{number['micro']}"
        return printable(f"{text} {answer['package']}".strip())

    @contextlib.asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[qemu_qmp.EventListener]:
        """A listener for the events called `names`."""
        listener = qemu_qmp.EventListener(names=names)
        with self._client.listen(listener):
            yield listener

    async def close(self) -> None:
        """Disconnect; a QEMU that has gone already is no error."""
        # qemu.qmp 0.0.6 raises a bare EOFError where QEMU closed first.
        with contextlib.suppress(qemu_qmp.QMPError, EOFError, OSError):
            await self._client.disconnect()
