"""Checkpoint and restart (QEMU's docs/devel/migration/CPR.rst): QEMU pauses the guest first.

The guest has used its write-once pages before anything moves, so it alone knows what the device wrote
into them: there is no dirty log, and no journal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError

from ...guest.channel import START_WRITE_ONCE
from ...memory.ram import RamFile
from ...qemu.machine import option_value
from ...qemu.qemu import Qemu
from ...qemu.qmp import Qmp, QmpError, QmpRefusal, QmpTimeoutError
from ..attempt import Attempt
from ..judgement import EvidenceSource
from ..pair import QemuPair
from ..transport import FILE, Ends, channel, channel_path
from .base import Scenario


class _GuestPaused(Scenario):
    """The guest is paused before anything moves."""

    is_held_in_precopy = False
    has_journal = False
    is_repeatable = False

    def evidence_source(self, *, has_evidence: bool) -> EvidenceSource:
        """The guest, which has used its write-once pages before it was paused."""
        return EvidenceSource.STILL

    async def use_once_pages(self, attempt: Attempt) -> None:
        """Let the guest use its write-once pages, all of them.

        Raises:
            UntestableError: it does not.
        """
        guest = attempt.pair.source_guest
        await guest.tell(START_WRITE_ONCE)
        await guest.wait_for(lambda: "write-once-done" in guest.latest, "used its write-once pages")

    async def prepare(self, attempt: Attempt) -> None:
        """Let the guest use its write-once pages."""
        await self.use_once_pages(attempt)
        await super().prepare(attempt)

    async def migrate(self, attempt: Attempt) -> None:
        """Migrate; the guest has nothing to do meanwhile."""
        await attempt.migration.start()
        async for _ in attempt.follow():
            pass
        await attempt.migration.load()


class CprReboot(_GuestPaused):
    """The guest saved into a file, as before its host gets a new kernel."""

    name = "cpr-reboot"
    summary = (
        "stopped, saved into a file, and restored: how a guest outlives a new kernel of its host"
    )
    transport = FILE
    parameters: Mapping[str, Any] = {"mode": "cpr-reboot"}


class _MemoryKept(_GuestPaused):
    """The guest's memory outlives the source's QEMU; the destination comes when it is needed."""

    machine_options = ",aux-ram-share=on"

    async def start(self, pair: QemuPair) -> None:
        """Start the source alone, and wait until its guest is ready."""
        try:
            await pair.guarded(pair.start_source())
        except QmpTimeoutError:
            raise
        except QmpError as error:
            raise self.explain_refusal(str(error)) from error
        await pair.guarded(pair.boot())

    def configured(self, ends: Ends) -> Sequence[Qmp]:
        """The source alone: the destination does not answer yet."""
        return (ends.source,)


class CprTransfer(_MemoryKept):
    """The memory's file descriptors handed to another QEMU over a channel of their own."""

    name = "cpr-transfer"
    summary = "stopped, and its memory handed to another QEMU on the same host without a copy"
    parameters: Mapping[str, Any] = {"mode": "cpr-transfer"}

    async def prepare(self, attempt: Attempt) -> None:
        """Launch a destination that waits for the source's file descriptors before all else."""
        await self.use_once_pages(attempt)
        pair = attempt.pair
        await pair.launch_destination("-incoming", json.dumps(channel(pair.folder, "cpr")))
        await pair.wait_for_socket(channel_path(pair.folder, "cpr"))
        attempt.joined = pair.destination.connect

    async def begin(self, ends: Ends) -> None:
        """Send the file descriptors; when the destination has them it can be told to read."""
        assert ends.joined is not None
        main, descriptors = (channel(ends.folder, kind) for kind in ("main", "cpr"))
        await ends.source.execute("migrate", channels=[main, descriptors])
        await ends.joined()
        await ends.destination.execute("migrate-incoming", channels=[main])

    def require_arrival(self, source: Sequence[RamFile], destination: Sequence[RamFile]) -> None:
        """See that both QEMUs have the same memory.

        Raises:
            UntestableError: they have not.
        """
        if source[0].inode != destination[0].inode:
            raise UntestableError("the source has copied its memory and not handed it over")


_SUCCESSOR_SOCKET: Final = "successor-qmp.sock"


class CprExec(_MemoryKept):
    """QEMU executed anew by the source's process, which keeps the memory."""

    name = "cpr-exec"
    summary = "stopped, and QEMU executed anew in the same process, which keeps the memory"
    transport = FILE
    parameters: Mapping[str, Any] = {"mode": "cpr-exec"}

    is_over_when_begun = True
    downtime_is_measurable = False
    stops_rings = False

    async def prepare(self, attempt: Attempt) -> None:
        """Tell the source what to execute, and copy its RAM, which is the destination's later.

        Raises:
            UnsupportedScenarioError: the source does not know that parameter.
            UntestableError: the guest or a QEMU does not do what it takes.
        """
        await self.use_once_pages(attempt)
        pair = attempt.pair
        pair.succeed()
        attempt.joined = partial(_connect_successor, pair)
        command = await _successor_command(pair)
        stream = self.transport.read_from(pair.ends())
        pair.device.release(pair.source_side)
        try:
            await pair.source.qmp.execute(
                "migrate-set-parameters", cpr_exec_command=[*command, "-S", "-incoming", stream]
            )
        except QmpRefusal as refusal:
            raise self.explain_refusal(str(refusal)) from refusal
        await attempt.copy_source_ram()

    async def begin(self, ends: Ends) -> None:
        """Have the source save itself and execute QEMU, which loads at once."""
        assert ends.joined is not None
        await ends.source.execute("migrate", uri=await self.transport.written_to(ends))
        await ends.joined()

    async def load(self, ends: Ends) -> None:
        """Nothing is left to be done: the new QEMU has been told on its command line."""

    def source_afterwards(self, pair: QemuPair) -> Qemu:
        """The new QEMU: the old one is no more."""
        return pair.destination


async def _successor_command(pair: QemuPair) -> list[str]:
    """The source's command, but with a new QMP socket and the devices' arguments as destination.

    A greeting in the midst of the old socket's stream is nothing that a QMP client takes.
    """
    command = list(pair.source.process.command)
    place = next(i for i, word in enumerate(command) if word.startswith("socket,id=qmp,"))
    path = option_value(_successor_socket(pair))
    command[place] = f"socket,id=qmp,path={path},server=on,wait=off"
    attached = pair.attached[pair.source_side]
    place = command.index(attached[0])
    while command[place : place + len(attached)] != attached:
        place = command.index(attached[0], place + 1)
    command[place : place + len(attached)] = await pair.device.attach(pair.destination_side)
    return command


def _successor_socket(pair: QemuPair) -> Path:
    return pair.folder / _SUCCESSOR_SOCKET


async def _connect_successor(pair: QemuPair) -> None:
    await pair.wait_for_socket(_successor_socket(pair))
    await pair.source.qmp.close()
    await pair.destination.qmp.connect(str(_successor_socket(pair)))
