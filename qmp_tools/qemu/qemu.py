"""A QEMU under QMP: anyone's, or one that we start, end and reap whatever happens."""

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
from .qmp import Qmp, QmpError, QmpTimeoutError

_PLUGGED_BY: Final = {"-object": "object_add", "-device": "device_add"}
"""The human monitor's commands that take what the command line's options take."""


class Qemu:
    """A QEMU that answers on `qmp`, whoever started it.

    `pid` is its process, or 0 where that cannot be seen from here. `socket_path` is the path of a
    QMP socket of it.
    """

    def __init__(self, qmp: Qmp, pid: int, socket_path: Path) -> None:
        self.qmp = qmp
        self.pid = pid
        self.socket_path = socket_path

    @property
    def name(self) -> str:
        """What messages call it, such as 'source QEMU'."""
        return self.qmp.name

    @property
    def version(self) -> str:
        """QEMU's version, with its packager's where it has one: '7.2.22 Debian …'."""
        return self.qmp.version

    async def status(self) -> str:
        """The run state, such as 'running', 'paused' or 'postmigrate'."""
        answer: dict[str, Any] = await self.qmp.execute("query-status")
        return str(answer["status"])

    async def monitor(self, command: str) -> str:
        """What the human monitor prints for `command`."""
        return str(await self.qmp.execute("human-monitor-command", command_line=command))


class OwnedQemu(Qemu):
    """A QEMU whose process is ours.

    Nobody uses its QMP socket at `socket_path` yet: our session has a socket of its own. `report`
    is its second serial port (COM2) as a stream: the channel on which our guests tell what they
    see. The first serial port goes to ``<name>-console.log`` in the run's folder.
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
        """Start a QEMU without waiting for it on QMP: `connect` has to follow.

        Our QMP session runs over a socket pair: no path, no retries, and a wrong command line is an
        immediate end of file with QEMU's own words in the log.

        Args:
            name: what it is called, before 'QEMU'.
            binary: the program.
            arguments: its arguments, next to those of our QMP session and serial ports.
            folder: where its logs and its second QMP socket are.
            timeout_s: bounds the wait for each of its answers, in seconds.
            pass_fds: the file descriptors that it inherits, which `arguments` may name.

        Raises:
            UntestableError: it could not be started.
        """
        ours_qmp, theirs_qmp = socket.socketpair()
        ours_report, theirs_report = socket.socketpair()
        console = folder / f"{name}-console.log"
        socket_path = folder / f"{name}-qmp.sock"
        command = [
            os.fspath(binary),
            "-nodefaults",
            "-display",
            "none",
            *("-chardev", f"socket,id=qmp,fd={theirs_qmp.fileno()}"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-qmp", f"unix:{option_value(socket_path)},server=on,wait=off"),
            *("-chardev", f"file,id=console,path={option_value(console)}"),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=report,fd={theirs_report.fileno()}"),
            *("-serial", "chardev:report"),
            *arguments,
        ]
        (folder / f"{name}-command").write_text(" ".join(command) + "\n")
        with theirs_qmp, theirs_report:
            process = await Process.start(
                f"{name} QEMU",
                command,
                folder / f"{name}-qemu.log",
                pass_fds=(theirs_qmp.fileno(), theirs_report.fileno(), *pass_fds),
            )
        process.more_logs = (console,)  # a guest that fails early has nothing else to say it on
        qemu = cls(process, Qmp(f"{name} QEMU", timeout_s), console, socket_path)
        qemu._unconnected = ours_qmp
        try:
            qemu.report, qemu.report_input = await asyncio.open_connection(sock=ours_report)
        except asyncio.CancelledError:
            await qemu.end()
            raise
        return qemu

    def successor(self) -> OwnedQemu:
        """What the same process is once it has executed QEMU anew; its QMP is not connected yet.

        The serial channel's socket is inherited.
        """
        qmp = Qmp(f"{self.process.name}, executed anew,", self.qmp.timeout_s)
        successor = OwnedQemu(self.process, qmp, self.console, self.socket_path)
        successor.report, successor.report_input = self.report, self.report_input
        return successor

    async def connect(self) -> None:
        """Wait until it answers on QMP; where it does not, it has ended afterwards.

        Raises:
            QmpTimeoutError: it runs, and has not answered in time.
            QmpError: it ended instead.
        """
        connection, self._unconnected = self._unconnected, None
        assert connection is not None
        try:
            await self.qmp.connect(connection)
        except QmpTimeoutError as error:
            await self.end()
            raise QmpTimeoutError(f"{error}\n{self.process.log_tail()}".rstrip()) from error
        except QmpError as error:
            # It closed its socket, and so is about to end: how it does tells why.
            late = QmpTimeoutError(
                f"{self.process.name} closed its QMP socket and has not ended within "
                f"{self.qmp.timeout_s:g} s"
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
        """Add to the running machine what `arguments` would have made of it at its start.

        Of the options with an argument each, -object and -device.

        Raises:
            QmpError: QEMU refused one of them.
        """
        for option, value in zip(arguments[::2], arguments[1::2], strict=True):
            command = f"{_PLUGGED_BY[option]} {value}"
            if refusal := (await self.monitor(command)).strip():
                raise QmpError(f"{self.process.name} refused {command}: {refusal}")

    async def end(self) -> None:
        """End the process if it still runs, and let go of its sockets."""
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
    """A QEMU that answers on QMP, for as long as the context lasts; see `OwnedQemu.launch`.

    Raises:
        UntestableError: it could not be started, or does not answer on QMP.
    """
    qemu = await OwnedQemu.launch(name, binary, arguments, folder, timeout_s=timeout_s)
    await qemu.connect()
    try:
        yield qemu
    finally:
        await qemu.end()


@contextlib.asynccontextmanager
async def idle_qemu(name: str, binary: Path, *, timeout_s: float) -> AsyncIterator[OwnedQemu]:
    """A QEMU without a machine, which can be asked what it is able to do.

    Raises:
        UntestableError: it could not be started, or does not answer on QMP.
    """
    with run_folder() as folder:
        machine = ["-machine", "none"]
        async with running_qemu(name, binary, machine, folder, timeout_s=timeout_s) as qemu:
            yield qemu
