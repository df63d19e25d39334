"""A QEMU process under QMP: started over inherited sockets, ended and reaped whatever happens."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..host.process import Process
from ..host.timeout import bounded
from .machine import option_value
from .qmp import Qmp, QmpError, QmpTimeoutError

_PLUGGED_BY: Final = {"-object": "object_add", "-device": "device_add"}
"""The human monitor's commands that take what the command line's options take."""


class Qemu:
    """A running QEMU.

    `report` is its second serial port (COM2) as a stream: the channel on which our guests tell what
    they see. The first serial port goes to ``<name>-console.log`` in the run's folder.
    """

    def __init__(self, process: Process, qmp: Qmp, console: Path) -> None:
        self.process = process
        self.qmp = qmp
        self.console = console
        self._unconnected: socket.socket | None = None
        self.report: asyncio.StreamReader
        self.report_input: asyncio.StreamWriter

    @classmethod
    async def start(
        cls,
        name: str,
        binary: Path,
        arguments: Sequence[str],
        folder: Path,
        *,
        timeout_s: float,
    ) -> Qemu:
        """Start `binary` as '`name` QEMU' with `arguments` and our QMP and serial channels.

        QMP runs over a socket pair: no path, no retries, and a wrong command line is an immediate
        end of file with QEMU's own words in the log. `timeout_s` bounds each wait for an answer.

        Raises:
            UntestableError: it could not be started, or does not answer on QMP.
        """
        qemu = await cls.launch(name, binary, arguments, folder, timeout_s=timeout_s)
        await qemu.connect()
        return qemu

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
    ) -> Qemu:
        """Start it as `start` does, without waiting for it on QMP: `connect` has to follow.

        It inherits the file descriptors `pass_fds`, which `arguments` may name.

        Raises:
            UntestableError: it could not be started.
        """
        ours_qmp, theirs_qmp = socket.socketpair()
        ours_report, theirs_report = socket.socketpair()
        console = folder / f"{name}-console.log"
        command = [
            os.fspath(binary),
            "-nodefaults",
            "-display",
            "none",
            *("-chardev", f"socket,id=qmp,fd={theirs_qmp.fileno()}"),
            *("-mon", "chardev=qmp,mode=control"),
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
        qemu = cls(process, Qmp(f"{name} QEMU", timeout_s), console)
        qemu._unconnected = ours_qmp
        try:
            qemu.report, qemu.report_input = await asyncio.open_connection(sock=ours_report)
        except asyncio.CancelledError:
            await qemu.end()
            raise
        return qemu

    def successor(self) -> Qemu:
        """What the same process is once it has executed QEMU anew; its QMP is not connected yet.

        The serial channel's socket is inherited.
        """
        qmp = Qmp(f"{self.process.name}, executed anew,", self.qmp.timeout_s)
        successor = Qemu(self.process, qmp, self.console)
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
            told = await self.qmp.execute("human-monitor-command", command_line=command)
            if told.strip():
                raise QmpError(f"{self.process.name} refused {command}: {told.strip()}")

    async def end(self) -> None:
        """End the process if it still runs, and let go of its sockets."""
        await self.process.end()
        if self._unconnected is not None:
            self._unconnected.close()
        await self.qmp.close()
        if hasattr(self, "report_input"):
            self.report_input.close()
