"""Start the device process of a proof, read its events, and request its evidence."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dmaproof.errors import RefusedError, UntestableError, WaitTimeoutError
from dmaproof.evidence import Evidence

from ..host.process import Process
from ..host.run_folder import TMPDIR_REMEDY
from ..host.timeout import bounded
from ..qemu.machine import DESTINATION

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceOptions:
    """The options of ``python -m dmaproof.vhost_user``; `harvest` has the form of ``--harvest``.

    A subclass may set another `module` with the same arguments. `destination_lacks` are the virtio
    features (bits) that only the source's side offers.
    """

    module: ClassVar[str] = "dmaproof.vhost_user"

    device: str = "blk"
    tracker: str = "iommu"
    harvest: str = "0.2"
    fault: str | None = None
    seed: int = 1
    destination_lacks: int = 0

    def arguments(self) -> list[str]:
        """Return the options as command-line arguments."""
        return [
            *("--device", self.device),
            *("--tracker", self.tracker),
            *("--harvest", self.harvest),
            *("--seed", str(self.seed)),
            *(("--fault", self.fault) if self.fault else ()),
            *self._withheld(),
        ]

    def _withheld(self) -> list[str]:
        if not self.destination_lacks:
            return []
        return ["--withhold", f"{DESTINATION}={self.destination_lacks:#x}"]


class Device:
    """The running device process; `refused` is done when it has refused data of a front end.

    `timeout_s` bounds the wait for each of its answers.
    """

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        control: asyncio.StreamWriter,
        timeout_s: float,
    ) -> None:
        self.process = process
        self._timeout_s = timeout_s
        self.refused: asyncio.Future[UntestableError] = asyncio.get_running_loop().create_future()
        self._latest: dict[tuple[str, str], dict[str, Any]] = {}
        """The last event of each kind and session."""
        self._control = control
        self._reported = asyncio.Condition()
        self._listening = asyncio.ensure_future(self._listen(reader))

    @classmethod
    async def start(
        cls,
        options: DeviceOptions,
        sockets: Mapping[str, Path],
        folder: Path,
        *,
        timeout_s: float,
        name: str = "device",
        state: Path | None = None,
    ) -> Device:
        """Start the process `name` and wait until it listens on `sockets` (session name → path).

        A device that can be killed and started again keeps its state in the folder `state`. It
        does not listen, but connects to the front ends that listen on `sockets`.

        Raises:
            UntestableError: the process does not start, or does not listen.
        """
        own, inherited = socket.socketpair()
        command = [
            *(sys.executable, "-m", options.module),
            *("--control", str(inherited.fileno())),
            *options.arguments(),
        ]
        if state is not None:
            command += ["--state", str(state)]
        for session, path in sockets.items():
            command += ["--seek" if state else "--socket", f"{session}={path}"]
        with inherited:
            log = folder / f"{name.replace(' ', '-')}.log"
            process = await Process.start(name, command, log, pass_fds=(inherited.fileno(),))
        reader, writer = await asyncio.open_connection(sock=own)
        device = cls(process, reader, writer, timeout_s)
        try:
            for session in sockets:
                await device.wait_for("seeking" if state else "listening", session)
        except UntestableError:
            await device.end()
            raise
        return device

    @property
    def silent(self) -> asyncio.Future[None]:
        """A future that is done when the process has ended and all its events have been read."""
        return self._listening

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (line := await reader.readline()).endswith(b"\n"):  # else it died in mid-line
            try:
                event = json.loads(line)
                name, session = str(event["event"]), str(event["session"])
            except (ValueError, KeyError, TypeError):
                self._refuse(
                    UntestableError(
                        f"the device process sent a line that is not an event: {line[:200]!r}"
                    )
                )
                break
            if name == "refused":
                self._refuse(
                    RefusedError(
                        f"the device refused what the {session} QEMU or its guest sent: "
                        f"{event.get('message')}"
                    )
                )
            elif name == "failed":
                self._refuse(
                    UntestableError(
                        f"the {self.process.name} cannot continue: {event.get('message')}"
                    )
                )
            async with self._reported:
                self._latest[name, session] = event
                self._reported.notify_all()
        async with self._reported:
            self._reported.notify_all()

    def _refuse(self, why: UntestableError) -> None:
        if not self.refused.done():
            self.refused.set_result(why)

    async def wait_for(self, event: str, session: str) -> dict[str, Any]:
        """Return the last `event` of `session`; if there was none, wait for one.

        Raises:
            UntestableError: the process ended, or does not answer.
        """
        return await self._wait_for(
            lambda: self._latest.get((event, session)), f"no {event!r} event"
        )

    def accepted_features(self, session: str) -> int | None:
        """Return the virtio features that the driver of `session` last accepted; None if never."""
        event = self._latest.get(("features", session))
        return int(event["accepted"]) if event else None

    async def logging_ended(self, session: str) -> None:
        """Wait until logging is off in `session`; it may never have been on.

        Raises:
            UntestableError: logging stays on, or the process ended.
        """

        def is_off() -> bool:
            return not self._latest.get(("logging", session), {"on": False})["on"]

        await self._wait_for(is_off, "QEMU has not removed the dirty log")

    async def _wait_for(self, found: Callable[[], T | None], what_is_missing: str) -> T:
        """Return the result of `found` when it is true; `what_is_missing` explains a failure."""

        def late() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"the {self.process.name} has not answered within {self._timeout_s:g} s "
                f"({what_is_missing}); allow more time (--timeout)\n"
                f"{self.process.log_tail()}".rstrip()
            )

        async with bounded(self._timeout_s, late), self._reported:
            while not found() and not self._listening.done():
                await self._reported.wait()
        answer = found()
        if not answer and self.refused.done():
            raise self.refused.result()
        if not answer:
            raise UntestableError(
                f"the {self.process.name} {self.process.how_it_ended()} before it answered "
                f"({what_is_missing})\n{self.process.log_tail()}".rstrip()
            )
        return answer

    async def evidence(self, session: str, folder: Path) -> Evidence:
        """Request the device's evidence of `session`, which is passed through `folder`.

        Raises:
            UntestableError: the session or the process has ended.
        """
        self._latest.pop(("evidence", session), None)
        request = {"do": "evidence", "session": session, "folder": str(folder)}
        self._control.write(json.dumps(request).encode() + b"\n")
        await self._control.drain()
        answer = await self.wait_for("evidence", session)
        if not answer["found"]:
            raise UntestableError(f"the device's session with the {session} QEMU has ended")
        if "error" in answer:
            raise UntestableError(
                f"the device cannot write its evidence to {folder}: {answer['error']}; "
                f"{TMPDIR_REMEDY}"
            )
        return Evidence.load(folder)

    async def kill(self) -> None:
        """Kill the process with SIGKILL, to simulate a crash."""
        await self.process.kill()
        self._control.close()

    async def end(self) -> None:
        """End the process, which also ends by itself when its control socket is closed."""
        self.process.expect_end()
        self._control.close()
        await self.process.end()
