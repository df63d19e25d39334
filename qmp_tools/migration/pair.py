"""Start, guard, swap and end the two QEMUs of a proof with their guests and their device.

A `QemuPair` is the same for every scenario. It offers the steps that a scenario
(`scenarios.base.Scenario`) is made of: start the destination late, plug memory or a disk, execute
QEMU again in the source's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from dmaproof.errors import UntestableError, WaitTimeoutError

from ..devices.device import AttachedDevice
from ..guest.channel import (
    AGAIN,
    LONGER_TIMEOUT,
    USE_NEW_MEMORY,
    GuestChannel,
    GuestGaveUpError,
)
from ..host.timeout import bounded, wait_until
from ..qemu.machine import (
    DESTINATION,
    INCOMING,
    RESIZABLE,
    SOURCE,
    Machine,
    address_of,
    dimm_name,
    format_memory,
)
from ..qemu.memory_backend import MemoryBackend
from ..qemu.pci_express import behind_ports, is_port
from ..qemu.qemu import OwnedQemu
from ..qemu.qtest import Qtest
from ..qemu.reconnection import with_reconnection
from ..qemu.vhost_user_trace import logs_installed, trace_arguments, unanswered
from ..qemu.virtio_bus import on_bus
from .alarms import best_reason, with_failure
from .transport import LOCALHOST, Ends

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_KVM_REMEDY: Final = f"{LONGER_TIMEOUT}, and where KVM does not run guests, use --accel tcg"


class ResetReason(StrEnum):
    """Who has reset a machine: QEMU's names (ShutdownCause)."""

    OPERATOR = "host-qmp-system-reset"
    GUEST = "guest-reset"


class QemuPair:
    """The processes of one proof: the device, two QEMUs, and the reports of their guests.

    `qemus` and `guests` have one entry for each side that has been started, `SOURCE` and
    `DESTINATION`. These are also the names of the side's processes and files. The guest migrates
    from `source_side` to `destination_side`; `swap_roles` exchanges them.
    """

    def __init__(
        self,
        machine: Machine,
        binaries: Mapping[str, Path],
        device: AttachedDevice,
        folder: Path,
        *,
        timeout_s: float,
        host: str = LOCALHOST,
        has_test_channel: bool = False,
    ) -> None:
        """Plan a pair, without starting anything.

        Args:
            machine: the machine that both QEMUs emulate.
            binaries: the QEMU of each side.
            device: the device, which serves both QEMUs.
            folder: for sockets and logs.
            timeout_s: the bound of each wait.
            host: the address at which the destination listens in a migration over TCP.
            has_test_channel: whether QEMU is to write to the guest's hold pages (`hold`).
        """
        self.device = device
        self.folder = folder
        self.host = host
        self.timeout_s = timeout_s
        self.qemus: dict[str, OwnedQemu] = {}
        self.guests: dict[str, GuestChannel] = {}
        self.qtests: dict[str, Qtest] = {}
        self.attached: dict[str, list[str]] = {}
        """The device's arguments, by side."""
        self.hold_pages: Sequence[int] = ()
        """The guest-physical addresses of the guest's hold pages."""
        self.boot_s = 0.0
        self.source_side, self.destination_side = SOURCE, DESTINATION
        self._machine = machine
        self._binaries = binaries
        self._has_test_channel = has_test_channel
        self._plugs_devices = False
        self._dimms: list[list[str]] = []
        """The arguments of the plugged DIMMs."""

    @property
    def source(self) -> OwnedQemu:
        """The QEMU that the guest migrates from."""
        return self.qemus[self.source_side]

    @property
    def destination(self) -> OwnedQemu:
        """The QEMU that the guest migrates to."""
        return self.qemus[self.destination_side]

    @property
    def source_guest(self) -> GuestChannel:
        """The guest before the migration."""
        return self.guests[self.source_side]

    @property
    def destination_guest(self) -> GuestChannel:
        """The guest after the migration."""
        return self.guests[self.destination_side]

    def share_ram(self) -> None:
        """Plan that both QEMUs have their guest's RAM in the same files, in the run's folder."""
        backend = MemoryBackend("file", str(self.folder), named=True)
        self._machine = replace(self._machine, backend=backend)

    # Starting -------------------------------------------------------------------------------------

    async def start_source(self) -> None:
        """Start the source.

        Raises:
            UntestableError: QEMU could not be started.
        """
        await self._launch(self.source_side)
        await self.source.connect()

    async def start_source_without_devices(self) -> None:
        """Start the source with only the devices' back ends; `boot_and_plug_devices` plugs them.

        Raises:
            UntestableError: QEMU could not be started.
        """
        self._plugs_devices = True
        await self._launch(self.source_side, only_backends=True)
        await self.source.connect()

    async def start_destination(self) -> None:
        """Start the destination with everything that is plugged into the source.

        Raises:
            UntestableError: QEMU could not be started.
        """
        await self.launch_destination()
        await self.destination.connect()

    async def start_both(self) -> None:
        """Start both QEMUs at once.

        Raises:
            UntestableError: one of them could not be started.
        """
        outcomes = await asyncio.gather(
            self.start_source(),
            self.start_destination(),
            return_exceptions=True,  # waits for both, so that `end` ends whatever has started
        )
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def launch_destination(self, *extra: str) -> None:
        """Launch the destination with `extra` arguments; it may not answer on QMP yet.

        Raises:
            UntestableError: QEMU could not be started.
        """
        await self._launch(self.destination_side, *INCOMING, *extra)

    async def boot(self) -> None:
        """Wait until the source's guest is ready to migrate.

        Raises:
            UntestableError: the guest does not become ready.
        """
        began_s = time.monotonic()
        await self._boot(began_s)

    async def boot_and_plug_devices(self) -> None:
        """Plug the devices as soon as the source's guest has booted; wait until it is ready.

        Raises:
            UntestableError: the guest does not become ready.
        """
        began_s = time.monotonic()
        guest = self.source_guest
        await guest.wait_for(lambda: "waiting" in guest.latest, "booted")
        _logger.info("plugging the disk")
        await self.source.plug(_devices(self.attached[self.source_side], True))
        await self._boot(began_s)

    async def reboot(
        self, side: str, reset: Callable[[], Awaitable[Any]], reason: ResetReason
    ) -> None:
        """Wait until `reset` has reset the machine of `side` and its guest is ready again.

        At any other time, a reset ends QEMU (-no-reboot), because dmaproof's guests reset their
        machine only on command.

        Raises:
            UntestableError: the machine is not reset for this reason, or its guest does not become
                ready.
        """
        qmp, guest = self.qemus[side].qmp, self.guests[side]
        late = WaitTimeoutError(
            f"{qmp.name} has not reset its machine within {self.timeout_s:g} s; {LONGER_TIMEOUT}"
        )
        await qmp.execute("set-action", reboot="reset")
        guest.await_boot()
        async with qmp.events("RESET") as resets, bounded(self.timeout_s, lambda: late):
            await reset()
            event: Mapping[str, Any] = await resets.get()
        if (found := event["data"]["reason"]) != reason:
            raise UntestableError(
                f"{qmp.name} has reset its machine for the reason {found!r}; expected {reason!r}"
            )
        await self._wait_until_ready(guest)
        # Only now, because SeaBIOS resets the machine again on its way (tryReboot).
        await qmp.execute("set-action", reboot="shutdown")

    def logs_installed(self, side: str) -> int | None:
        """Return how often the QEMU of `side` has sent its dirty log to a device's process.

        None if the device has no process. 0 if this QEMU does not trace its messages.
        """
        return logs_installed(self.trace(side)) if self.device.serving(side) else None

    async def _boot(self, began_s: float) -> None:
        guest = self.source_guest
        await self._wait_until_ready(guest)
        self.device.check_guest(guest)
        self.boot_s = time.monotonic() - began_s
        _logger.info("guest ready after %.1f s", self.boot_s)

    async def _wait_until_ready(self, guest: GuestChannel) -> None:
        await guest.wait_for(lambda: "ready" in guest.latest, "become ready")
        self.hold_pages = tuple(guest.hold_pages)

    async def plug_dimm(self) -> None:
        """Plug another DIMM into the source, and have the guest put its write-once pages there.

        Raises:
            UntestableError: QEMU refuses the DIMM, or the guest does not use it.
        """
        number = len(self._dimms)
        name = dimm_name(number)
        _logger.info("plugging %s", name)
        await self.source.plug(self._machine.dimm_arguments(number))
        (address,) = [
            address_of(device["data"])
            for device in await self.source.qmp.execute("query-memory-devices")
            if device["data"].get("id") == name
        ]
        self._dimms.append(self._machine.dimm_arguments(number, address))
        await self.use_new_memory(f"{name} at {address:#x}")

    async def use_new_memory(self, name: str) -> None:
        """Have the source's guest put its write-once pages into plugged memory, called `name`.

        Raises:
            UntestableError: the guest does not use it.
        """
        guest = self.source_guest
        guest.latest.pop("memory", None)
        await guest.send(USE_NEW_MEMORY)
        await guest.wait_for(lambda: "memory" in guest.latest, "looked for new memory")
        if not (pages := guest.number("memory", "pages")):
            raise UntestableError(
                f"the guest did not find the plugged memory {name}; use a guest that supports "
                "memory hotplug"
            )
        _logger.info("%d write-once pages are in plugged memory: %s", pages, name)

    async def resize_memory(self, size: int) -> None:
        """Have the source's guest plug or unplug memory until virtio-mem has `size` bytes.

        Raises:
            WaitTimeoutError: the guest does not.
        """
        qmp, path = self.source.qmp, f"/machine/peripheral/{RESIZABLE}"
        _logger.info("resizing the memory of virtio-mem to %s", format_memory(size))
        await qmp.execute("qom-set", path=path, property="requested-size", value=size)

        async def has_size() -> bool:
            return bool(await qmp.execute("qom-get", path=path, property="size") == size)

        error = WaitTimeoutError(
            f"the guest has not resized its memory of virtio-mem to {format_memory(size)} within "
            f"{self.timeout_s:g} s; {LONGER_TIMEOUT}"
        )
        await wait_until(has_size, self.timeout_s, lambda: error)

    async def inflate_balloon(self, size: int) -> None:
        """Have the source's guest give `size` bytes to its balloon.

        Raises:
            WaitTimeoutError: the guest does not.
        """
        qmp, rest = self.source.qmp, self._machine.memory_bytes - size
        _logger.info("inflating the balloon by %s", format_memory(size))
        await qmp.execute("balloon", value=rest)

        async def is_inflated() -> bool:
            return bool((await qmp.execute("query-balloon"))["actual"] == rest)

        error = WaitTimeoutError(
            f"the guest has not given {format_memory(size)} to its balloon within "
            f"{self.timeout_s:g} s; give the guest more memory (--memory), or allow more time "
            "(--timeout)"
        )
        await wait_until(is_inflated, self.timeout_s, lambda: error)

    def plan_successor(self) -> None:
        """Plan that the source's process executes QEMU again, which becomes the destination."""
        self.qemus[self.destination_side] = self.source.successor()
        self.guests[self.destination_side] = self.source_guest

    async def wait_for_socket(self, path: Path) -> None:
        """Wait until a QEMU listens at the socket `path`.

        Raises:
            WaitTimeoutError: no QEMU does so in time.
        """
        error = WaitTimeoutError(
            f"no QEMU listens at {path} after {self.timeout_s:g} s; allow more time (--timeout)"
        )
        await wait_until(path.exists, self.timeout_s, lambda: error)

    async def attach_device(self, side: str) -> list[str]:
        """Return the QEMU arguments of the device on `side`, as this machine has it.

        Raises:
            UntestableError: the device could not be started.
        """
        architecture = self._machine.architecture
        attached = on_bus(architecture.virtio_bus, await self.device.attach(side))
        attached = await with_reconnection(attached, self._binaries[side], timeout_s=self.timeout_s)
        if self._plugs_devices and architecture.hotplug_needs_port:
            attached = behind_ports(attached)
        return attached

    async def _launch(self, side: str, *extra: str, only_backends: bool = False) -> None:
        attached = self.attached[side] = await self.attach_device(side)
        arguments = [
            *self._machine.arguments(),
            *(argument for dimm in self._dimms for argument in dimm),
            *(_devices(attached, False) if only_backends else attached),
            *extra,
        ]
        if self.device.serving(side):
            arguments += trace_arguments(self.trace(side))
        with contextlib.ExitStack() as inherited:
            fds = [*self.device.inherited(side)]
            if self._has_test_channel:
                fds.append(await self._open_qtest(side, inherited))
                arguments += Qtest.arguments(fds[-1])
            self.qemus[side] = await OwnedQemu.launch(
                side,
                self.device.program(side, self._binaries[side]),
                arguments,
                self.folder,
                timeout_s=self.timeout_s,
                pass_fds=fds,
            )
        remedy = _KVM_REMEDY if self._machine.accelerator == "kvm" else LONGER_TIMEOUT
        self.guests[side] = GuestChannel(self.qemus[side], self.timeout_s, remedy)

    async def _open_qtest(self, side: str, inherited: contextlib.ExitStack) -> int:
        """Open the test channel to the QEMU of `side`; return the descriptor that QEMU inherits."""
        own, inherited_end = socket.socketpair()
        inherited.enter_context(inherited_end)
        if side in self.qtests:
            self.qtests[side].close()
        self.qtests[side] = await Qtest.open(f"{side} QEMU", own, self.timeout_s)
        return inherited_end.fileno()

    def trace(self, side: str) -> Path:
        """Return the file in which the QEMU of `side` traces what its vhost-user devices do."""
        return self.folder / f"{side}-vhost-user.log"

    # Running --------------------------------------------------------------------------------------

    def ends(self) -> Ends:
        """Return the two ends of a migration."""
        qemus = (self.source, self.destination)
        return Ends(
            self.source.qmp,
            self.destination.qmp,
            self.folder,
            self.host,
            printed=lambda: "\n".join(
                dict.fromkeys(qemu.process.log_tail() for qemu in qemus)
            ).strip(),
        )

    async def swap_roles(self) -> None:
        """End the QEMU that the guest has left; the destination becomes the source.

        Raises:
            UntestableError: the guest does not get ready for another migration.
        """
        self.source_guest.close()
        self.device.release(self.source_side)
        await self.source.end()
        self.source_side, self.destination_side = self.destination_side, self.source_side
        guest = self.source_guest
        await guest.send(AGAIN)
        await self.guarded(
            guest.wait_for(lambda: "again" in guest.latest, "got ready for another migration")
        )

    async def end(self) -> None:
        """End both QEMUs."""
        for guest in self.guests.values():
            guest.close()
        for qtest in self.qtests.values():
            qtest.close()
        await asyncio.gather(*(qemu.end() for qemu in self.qemus.values()))

    # Guarding -------------------------------------------------------------------------------------

    async def guarded(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`, but raise an error as soon as a process dies or the device refuses.

        If a wait in `work` times out, the error also names the process that does not answer. `work`
        must not call `guarded` itself.

        Raises:
            UntestableError: a process died, the device refused, or `work` failed.
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
                return task.result()  # the guest's own reason says more than any process's death
            if reason := await best_reason(alarms):
                for guest in self.guests.values():
                    await guest.read_last_lines()
                raise with_failure(reason, task.exception() if task.done() else None)
            try:
                return await task
            except WaitTimeoutError as error:
                lines = self._silent_processes() + self._with_logs(str(error))
                raise type(error)("\n".join(lines)) from error
        finally:
            for future in (task, *alarms):
                future.cancel()
            await asyncio.gather(task, *alarms, return_exceptions=True)

    def _silent_processes(self) -> list[str]:
        """Return a line about each process that does not answer."""
        lines = []
        for side, qemu in self.qemus.items():
            serving = self.device.serving(side)
            request = unanswered(self.trace(side)) if serving else None
            if request is not None:
                who = " or ".join(process.description for process in serving)
                lines.append(
                    f"{who} has not answered {request}, and {qemu.process.name} waits for it"
                )
            silent = [] if request else serving
            lines += [
                f"{process.description} is not running; continue it with SIGCONT"
                for process in (*silent, qemu.process)
                if process.is_stopped
            ]
        return list(dict.fromkeys(lines))  # one process may serve both sides

    def _with_logs(self, text: str) -> list[str]:
        """Return `text` and the last lines that the device's processes have printed."""
        tails = [process.log_tail() for process in self.device.processes]
        return [text, *(tail for tail in tails if tail and tail not in text)]


def _devices(arguments: Sequence[str], wanted: bool) -> list[str]:
    """Return a device's ``-device`` arguments if `wanted`, else its other arguments.

    A port is not plugged.
    """
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [word for pair in pairs if _is_plugged(*pair) is wanted for word in pair]


def _is_plugged(option: str, value: str) -> bool:
    return option == "-device" and not is_port(value)
