"""The two QEMUs of a proof with their guests, and its device: started, guarded, exchanged, ended.

A way to migrate tells what is special about them: the destination may have to be started late, as
it must know of what was plugged into the source; it may get the source's file descriptors before it
answers; it may be the very process that the source was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from dmaproof.errors import UntestableError, WaitTimeoutError

from ..devices.device import AttachedDevice
from ..guest.channel import AGAIN, USE_NEW_MEMORY, GuestChannel, GuestGaveUpError
from ..host.process import ProcessDiedError
from ..host.timeout import bounded
from ..migration.ways import WAYS, Ends, Plug, UnsupportedWayError, channel, channel_path
from ..qemu.machine import DESTINATION, INCOMING, SOURCE, dimm_arguments, option_value
from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpError, QmpRefusal, QmpTimeoutError
from ..qemu.qtest import Qtest
from ..qemu.vhost_user_trace import trace_arguments, unanswered
from .display import Display
from .model import Setup

_LOOK_AGAIN_S: Final = 0.01
_LATE_NEWS_S: Final = 1.0

T = TypeVar("T")


class QemuPair:
    """The processes of one proof: the device, two QEMUs, and what their guests tell.

    `qemus` has the QEMUs at the source and at the destination once `start` is done. The guest
    migrates from `here` to `there`, which `turn_round` exchanges.
    """

    def __init__(
        self, setup: Setup, display: Display, device: AttachedDevice, folder: Path
    ) -> None:
        self._setup = setup
        self._display = display
        self.device = device
        self._folder = folder
        self.qemus: dict[str, Qemu] = {}
        self._guests: dict[str, GuestChannel] = {}
        self._qtests: dict[str, Qtest] = {}
        self._hold_pages: Sequence[int] = ()
        """The guest-physical addresses of the guest's hold pages."""
        self._boot_s = 0.0
        self.here, self.there = SOURCE, DESTINATION
        self._way = WAYS[setup.scenario]
        self._attached: dict[str, list[str]] = {}
        """The device's arguments, by side."""
        self._dimms: list[list[str]] = []
        """The arguments of the DIMMs that are plugged."""

    async def start(self) -> None:
        """Start both QEMUs, and wait until the source's guest is ready.

        Raises:
            UntestableError: one of them could not be started, or the guest does not come to that.
        """
        try:
            await self.guarded(self._start_what_comes_first())
        except QmpTimeoutError:
            raise
        except QmpError as error:
            if self._way.machine_options:
                raise UnsupportedWayError(f"this QEMU lacks the way: {error}") from error
            raise
        await self.guarded(self._boot())
        if self._way.plug is Plug.DIMM:
            await self.guarded(self._plug_dimm())
        if self.there not in self.qemus and not self._joins_late:
            await self.guarded(self._start_destination())

    async def _start_what_comes_first(self) -> None:
        """Start the source; the destination too, but where it must be told of what is plugged, or
        comes by a channel."""
        if self._way.plug or self._joins_late:
            await self._start(self.here)
            return
        outcomes = await asyncio.gather(
            self._start(self.here),
            self._start_destination(),
            return_exceptions=True,  # so that both are over, and `end` knows of what has started
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _boot(self) -> None:
        began_s = time.monotonic()
        guest = self._guests[self.here]
        if self._way.plug is Plug.DISK:
            await guest.wait_for(lambda: "waiting" in guest.latest, "booted")
            self._display.say("plugging the disk")
            await self.qemus[self.here].plug(_devices(self._attached[self.here], True))
        await guest.wait_for(lambda: "ready" in guest.latest, "become ready")
        self._hold_pages = guest.hold_pages
        self._boot_s = time.monotonic() - began_s
        self._display.say(f"guest ready after {self._boot_s:.1f} s")

    async def _start_destination(self) -> None:
        await self._start(self.there, *INCOMING)

    async def _plug_dimm(self) -> None:
        """Plug another DIMM, and let the once pages lie in it."""
        name = f"dimm{len(self._dimms)}"
        qemu, guest = self.qemus[self.here], self._guests[self.here]
        self._display.say(f"plugging {name}")
        await qemu.plug(dimm_arguments(name))
        (address,) = [
            it["data"]["addr"]
            for it in await qemu.qmp.execute("query-memory-devices")
            if it["data"].get("id") == name
        ]
        self._dimms.append(dimm_arguments(name, address))
        await guest.tell(USE_NEW_MEMORY)
        await guest.wait_for(lambda: "memory" in guest.latest, "looked for new memory")
        if not (pages := guest.number("memory", "pages")):
            raise UntestableError(f"the guest did not find the memory of {name}")
        self._display.say(f"{name} is at {address:#x}; {pages} once pages lie in plugged memory")

    async def _start(self, name: str, *extra: str) -> None:
        await self._launch(name, *extra)
        await self.qemus[name].connect()

    async def _launch_to_join(self) -> None:
        """Launch a destination that waits for the source's file descriptors before all else."""
        descriptors = json.dumps(channel(self._folder, "cpr"))
        await self._launch(self.there, *INCOMING, "-incoming", descriptors)
        await self._wait_for_socket(channel_path(self._folder, "cpr"))

    @property
    def _joins_late(self) -> bool:
        return self._way.cpr_channel or self._way.in_place

    async def _prepare_successor(self) -> None:
        """Tell the source what to execute: itself, but as a destination, and with a new QMP socket.

        A greeting in the midst of the old socket's stream is nothing that a QMP client takes.
        """
        source = self.qemus[self.here]
        self.qemus[self.there] = source.successor()
        self._guests[self.there] = self._guests[self.here]
        command = list(source.process.command)
        place = next(index for index, it in enumerate(command) if it.startswith("socket,id=qmp,"))
        path = option_value(self._successor_socket)
        command[place] = f"socket,id=qmp,path={path},server=on,wait=off"
        attached = self._attached[self.here]
        place = command.index(attached[0])
        while command[place : place + len(attached)] != attached:
            place = command.index(attached[0], place + 1)
        command[place : place + len(attached)] = await self.device.attach(self.there)
        stream = self._way.stream.read_from(self._ends())
        self.device.release(self.here)
        try:
            await source.qmp.execute(
                "migrate-set-parameters", cpr_exec_command=[*command, "-S", "-incoming", stream]
            )
        except QmpRefusal as refusal:
            raise UnsupportedWayError(f"this QEMU lacks the way: {refusal}") from refusal

    @property
    def _successor_socket(self) -> Path:
        return self._folder / "successor-qmp.sock"

    async def _connect_successor(self) -> None:
        await self._wait_for_socket(self._successor_socket)
        await self.qemus[self.here].qmp.close()
        await self.qemus[self.there].qmp.connect(str(self._successor_socket))

    async def _wait_for_socket(self, path: Path) -> None:
        timeout_s = self._setup.limits.timeout_s
        error = WaitTimeoutError(f"nobody has listened at {path} within {timeout_s:g} s")
        async with bounded(timeout_s, lambda: error):
            while not path.exists():  # noqa: ASYNC110  (nothing of ours makes it)
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def _launch(self, name: str, *extra: str) -> None:
        binary = self._setup.qemu if name == SOURCE else self._setup.qemu_destination
        self._attached[name] = [*await self.device.attach(name)]
        plugged_later = self._way.plug is Plug.DISK and name == self.here
        arguments = [
            *self._setup.machine.arguments(),
            *(argument for dimm in self._dimms for argument in dimm),
            *(_devices(self._attached[name], False) if plugged_later else self._attached[name]),
            *extra,
        ]
        if self.device.serving(name):
            arguments += trace_arguments(self._trace(name))
        timeout_s = self._setup.limits.timeout_s
        with contextlib.ExitStack() as inherited:
            fds = []
            if self._way.holds_precopy:
                fds.append(await self._open_qtest(name, inherited))
                arguments += Qtest.arguments(fds[0])
            self.qemus[name] = await Qemu.launch(
                name, binary, arguments, self._folder, timeout_s=timeout_s, pass_fds=fds
            )
        self._guests[name] = GuestChannel(self.qemus[name], timeout_s)

    async def _open_qtest(self, name: str, inherited: contextlib.ExitStack) -> int:
        """Open the test channel to QEMU `name`; returns the descriptor that it is to inherit."""
        ours, theirs = socket.socketpair()
        inherited.enter_context(theirs)
        if name in self._qtests:
            self._qtests[name].close()
        qtest = await Qtest.open(f"{name} QEMU", ours, self._setup.limits.timeout_s)
        self._qtests[name] = qtest
        return theirs.fileno()

    async def end(self) -> None:
        """End both QEMUs."""
        for guest in self._guests.values():
            guest.close()
        for qtest in self._qtests.values():
            qtest.close()
        await asyncio.gather(*(qemu.end() for qemu in self.qemus.values()))

    async def guarded(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`, but end with an error as soon as a process dies or the device refuses.

        Where a wait reaches its bound, the error tells too which process is mute.

        Raises:
            UntestableError: what died, or what went wrong in `work`.
        """
        processes = [*self.device.processes, *(qemu.process for qemu in self.qemus.values())]
        task = asyncio.ensure_future(work)
        alarms: list[asyncio.Future[Any]] = [
            *(asyncio.ensure_future(process.missed()) for process in processes),
            asyncio.ensure_future(self.device.refusal()),
        ]
        try:
            await asyncio.wait([task, *alarms], return_when=asyncio.FIRST_COMPLETED)
            if task.done() and isinstance(task.exception(), GuestGaveUpError | None):
                return task.result()  # where the guest gave up, no death says more
            if reason := await _reason(alarms):
                for guest in self._guests.values():
                    await guest.hear_last_words()
                raise _with_failure(reason, task.exception() if task.done() else None)
            try:
                return await task
            except WaitTimeoutError as error:
                raise type(error)("\n".join(self._mute() + self._with_logs(str(error)))) from error
        finally:
            for future in (task, *alarms):
                future.cancel()
            await asyncio.gather(task, *alarms, return_exceptions=True)

    def _mute(self) -> list[str]:
        """Lines about the processes that do not answer."""
        told = []
        for side, qemu in self.qemus.items():
            serving = self.device.serving(side)
            waited_for = unanswered(self._trace(side)) if serving else None
            if waited_for is not None:
                who = " or ".join(process.description for process in serving)
                told.append(
                    f"{who} has not answered {waited_for}, and {qemu.process.name} waits for it"
                )
            silent = [] if waited_for else serving
            told += [
                f"{process.description} does not run"
                for process in (*silent, qemu.process)
                if process.is_stopped
            ]
        return list(dict.fromkeys(told))  # one process may serve both sides

    def _with_logs(self, text: str) -> list[str]:
        """`text`, and what the device's processes have printed last."""
        tails = [process.log_tail() for process in self.device.processes]
        return [text, *(tail for tail in tails if tail and tail not in text)]

    def _trace(self, side: str) -> Path:
        """Where the QEMU of `side` notes its vhost-user messages."""
        return self._folder / f"{side}-vhost-user.log"

    def _ends(self) -> Ends:
        source, destination = self.qemus[self.here], self.qemus[self.there]
        joined: Callable[[], Awaitable[None]] | None = None
        if self._way.cpr_channel:
            joined = destination.connect
        elif self._way.in_place:
            joined = self._connect_successor
        return Ends(
            source.qmp,
            destination.qmp,
            self._folder,
            self._setup.host,
            joined=joined,
            printed=lambda: "\n".join(
                dict.fromkeys(it.process.log_tail() for it in (source, destination))
            ).strip(),
        )

    async def turn_round(self) -> None:
        """End the QEMU that the guest has left, start a new one there, and get ready to go back.

        Raises:
            UntestableError: it could not be started.
        """
        self._guests[self.here].close()
        self.device.release(self.here)
        await self.qemus[self.here].end()
        self.here, self.there = self.there, self.here
        guest = self._guests[self.here]
        await guest.tell(AGAIN)
        await self.guarded(guest.wait_for(lambda: "again" in guest.latest, "begun anew"))
        if self._way.plug is Plug.DIMM:
            await self.guarded(self._plug_dimm())
        await self.guarded(self._start_destination())


async def _reason(alarms: Sequence[asyncio.Future[UntestableError]]) -> UntestableError | None:
    """The alarm that says best why something went wrong; None if there is no alarm.

    What ended by itself did so perhaps only because another was killed, and the kernel tells of
    that a moment later: a QEMU's memory is freed first.
    """
    told: set[asyncio.Future[UntestableError]] = set()
    silent = set(alarms)
    while silent and not any(_was_killed(it.result()) for it in told):
        news, silent = await asyncio.wait(
            silent, timeout=_LATE_NEWS_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not news:
            break
        told |= news
    reasons = [it.result() for it in alarms if it in told]
    return max(reasons, key=lambda it: (_was_killed(it), _says_why(it)), default=None)


def _says_why(reason: UntestableError) -> bool:
    return not isinstance(reason, ProcessDiedError)


def _with_failure(reason: UntestableError, failure: BaseException | None) -> UntestableError:
    """`reason`, with what QEMU said of it: a QEMU that has just been started is no alarm yet."""
    if isinstance(reason, ProcessDiedError) and isinstance(failure, QmpError):
        return ProcessDiedError(f"{reason}\n{failure}", reason.killed)
    return reason


def _was_killed(reason: UntestableError) -> bool:
    return isinstance(reason, ProcessDiedError) and reason.killed


def _devices(arguments: Sequence[str], wanted: bool) -> list[str]:
    """Of a device's arguments, those of the devices themselves, or those of what is behind them."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [word for pair in pairs if (pair[0] == "-device") is wanted for word in pair]
