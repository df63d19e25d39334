"""A QEMU under QMP: a third party's, or one that dmaproof starts, ends and reaps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..host.process import Process
from ..host.run_folder import run_folder
from ..host.timeout import bounded
from .machine import option_value
from .qmp import Monitor, Qmp, QmpError, QmpTimeoutError

SERIAL_PORTS: Final = ("-serial", "chardev:console", "-serial", "chardev:report")
"""The arguments that connect a machine's two serial ports to the console and to the reports."""

_PLUGGED_BY: Final = {"-object": "object_add", "-device": "device_add"}
"""The human monitor's commands that take the same values as the command line's options."""


class Qemu:
    """A QEMU that answers on `qmp`.

    `pid` is its process, or 0 if the process is in another PID namespace or on another host.
    `address` says where the QEMU was found: the path of a QMP socket, the URI of a libvirt domain,
    or the name of a test's object.
    """

    def __init__(self, qmp: Monitor, pid: int, address: str) -> None:
        self.qmp = qmp
        self.pid = pid
        self.address = address

    @property
    def name(self) -> str:
        """The name in messages, such as 'source QEMU'."""
        return self.qmp.name

    @property
    def version(self) -> str:
        """QEMU's version, with the packager's version if there is one: '7.2.22 Debian …'."""
        return self.qmp.version

    async def status(self) -> str:
        """Return the run state, such as 'running', 'paused' or 'postmigrate'."""
        answer: dict[str, Any] = await self.qmp.execute("query-status")
        return str(answer["status"])

    async def monitor(self, command: str) -> str:
        """Return the output of the human monitor for `command`."""
        return str(await self.qmp.execute("human-monitor-command", command_line=command))


class SocketQemu(Qemu):
    """A QEMU with a QMP session of dmaproof's over a socket.

    `socket_path` is the path of one of its QMP sockets.
    """

    qmp: Qmp

    def __init__(self, qmp: Qmp, pid: int, socket_path: Path) -> None:
        super().__init__(qmp, pid, str(socket_path))
        self.socket_path = socket_path


class OwnedQemu(SocketQemu):
    """A QEMU whose process dmaproof has started.

    dmaproof's QMP session runs over a socket pair, so the QMP socket at `socket_path` is free for
    other clients. `report` is the character device ``report`` as a stream, on which dmaproof's
    guests send their reports. The character device ``console`` goes to ``<name>-console.log`` in
    the run's folder.
    """

    def __init__(self, process: Process, qmp: Qmp, console: Path, socket_path: Path) -> None:
        super().__init__(qmp, process.pid, socket_path)
        self.process = process
        self.console = console
        self._unconnected: socket.socket | None = None
        self.report: asyncio.StreamReader
        self.report_input: asyncio.StreamWriter

    @classmethod
    async def launch(
        cls,
        name: str,
        binary: Path,
        arguments: Sequence[str],
        folder: Path,
        *,
        timeout_s: float,
        pass_fds: Sequence[int] = (),
    ) -> OwnedQemu:
        """Start a QEMU without waiting for its QMP greeting; the caller must call `connect` next.

        dmaproof's QMP session runs over a socket pair, which needs no path and no retries. If the
        command line is wrong, QEMU closes the socket at once, with its message in the log.

        Args:
            name: the name in messages, without 'QEMU'.
            binary: the program.
            arguments: its arguments, besides those of the QMP session. They connect the character
                devices ``console`` and ``report`` to the guest (`SERIAL_PORTS`,
                `Architecture.channels`).
            folder: for its logs and its second QMP socket.
            timeout_s: the bound of the wait for each answer, in seconds.
            pass_fds: the file descriptors that QEMU inherits, which `arguments` may name.

        Raises:
            UntestableError: QEMU could not be started.
        """
        own_qmp, qemu_qmp = socket.socketpair()
        own_report, qemu_report = socket.socketpair()
        console = folder / f"{name}-console.log"
        socket_path = folder / f"{name}-qmp.sock"
        command = [
            os.fspath(binary),
            "-nodefaults",
            "-display",
            "none",
            *("-chardev", f"socket,id=qmp,fd={qemu_qmp.fileno()}"),
            *("-qmp", "chardev:qmp"),
            *("-qmp", f"unix:{option_value(socket_path)},server=on,wait=off"),
            *("-chardev", f"file,id=console,path={option_value(console)}"),
            *("-chardev", f"socket,id=report,fd={qemu_report.fileno()}"),
            *arguments,
        ]
        (folder / f"{name}-command").write_text(" ".join(command) + "\n")
        with qemu_qmp, qemu_report:
            process = await Process.start(
                f"{name} QEMU",
                command,
                folder / f"{name}-qemu.log",
                pass_fds=(qemu_qmp.fileno(), qemu_report.fileno(), *pass_fds),
            )
        process.more_logs = (console,)  # a guest that fails early writes only to its console
        qemu = cls(process, Qmp(f"{name} QEMU", timeout_s), console, socket_path)
        qemu._unconnected = own_qmp
        try:
            qemu.report, qemu.report_input = await asyncio.open_connection(sock=own_report)
        except asyncio.CancelledError:
            await qemu.end()
            raise
        return qemu

    def successor(self) -> OwnedQemu:
        """Return the QEMU that the same process executes next; its QMP is not connected yet.

        The new QEMU inherits the socket of the serial channel.
        """
        qmp = Qmp(f"{self.process.name}, executed again,", self.qmp.timeout_s)
        successor = OwnedQemu(self.process, qmp, self.console, self.socket_path)
        successor.report, successor.report_input = self.report, self.report_input
        return successor

    async def connect(self) -> None:
        """Wait until QEMU answers on QMP; if it does not, end it.

        Raises:
            QmpTimeoutError: QEMU runs, but has not answered in time.
            QmpError: QEMU ended instead.
        """
        connection, self._unconnected = self._unconnected, None
        assert connection is not None
        try:
            await self.qmp.connect(connection)
        except QmpTimeoutError as error:
            await self.end()
            raise QmpTimeoutError(f"{error}\n{self.process.log_tail()}".rstrip()) from error
        except QmpError as error:
            # QEMU closed its socket, so it is about to end; its exit code tells more.
            late = QmpTimeoutError(
                f"{self.process.name} closed its QMP socket but has not ended within "
                f"{self.qmp.timeout_s:g} s; look at its log"
            )
            try:
                async with bounded(self.qmp.timeout_s, lambda: late):
                    await asyncio.shield(self.process.died)
            finally:
                how_it_ended = self.process.how_it_ended()
                await self.end()
            raise QmpError(
                f"{self.process.name} {how_it_ended} before it answered on QMP\n"
                f"{self.process.log_tail()}".rstrip()
            ) from error
        except asyncio.CancelledError:
            await self.end()
            raise

    async def plug(self, arguments: Sequence[str]) -> None:
        """Plug the objects and devices that `arguments` would have added at QEMU's start.

        `arguments` are -object and -device options, each followed by its value.

        Raises:
            QmpError: QEMU refused one of them.
        """
        for option, value in zip(arguments[::2], arguments[1::2], strict=True):
            command = f"{_PLUGGED_BY[option]} {value}"
            if refusal := (await self.monitor(command)).strip():
                raise QmpError(f"{self.process.name} refused {command}: {refusal}")

    async def end(self) -> None:
        """End the process if it still runs, and close the sockets."""
        await self.process.end()
        if self._unconnected is not None:
            self._unconnected.close()
        await self.qmp.close()
        if hasattr(self, "report_input"):
            self.report_input.close()


@contextlib.asynccontextmanager
async def running_qemu(
    name: str,
    binary: Path,
    arguments: Sequence[str],
    folder: Path,
    *,
    timeout_s: float,
) -> AsyncIterator[OwnedQemu]:
    """Run a QEMU that answers on QMP, until the context ends; see `OwnedQemu.launch`.

    Raises:
        UntestableError: QEMU could not be started, or does not answer on QMP.
    """
    qemu = await OwnedQemu.launch(name, binary, arguments, folder, timeout_s=timeout_s)
    await qemu.connect()
    try:
        yield qemu
    finally:
        await qemu.end()


@contextlib.asynccontextmanager
async def idle_qemu(name: str, binary: Path, *, timeout_s: float) -> AsyncIterator[OwnedQemu]:
    """Run a QEMU without a machine, to query its capabilities.

    Raises:
        UntestableError: QEMU could not be started, or does not answer on QMP.
    """
    with run_folder() as folder:
        machine = ["-machine", "none"]
        async with running_qemu(name, binary, machine, folder, timeout_s=timeout_s) as qemu:
            yield qemu
