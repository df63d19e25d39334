"""Checkpoint and restart scenarios (QEMU's docs/devel/migration/CPR.rst).

QEMU pauses the guest first. The guest uses its write-once pages before that, so the guest is the
only evidence of what the device wrote into them: QEMU has no dirty log, and the device no journal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UnsupportedError, UntestableError, UsageError

from ...guest.channel import START_WRITE_ONCE
from ...memory.ram import RamFile
from ...qemu.machine import Hardware, option_value
from ...qemu.memory_backend import MEMFD, MemoryBackend
from ...qemu.qemu import Qemu
from ...qemu.qmp import Qmp, QmpError, QmpRefusal, QmpTimeoutError
from ..attempt import Attempt
from ..judgement import EvidenceSource
from ..pair import QemuPair
from ..transport import FILE, Ends, channel, channel_path
from .base import Scenario


class _GuestPaused(Scenario):
    """The guest is paused before QEMU sends or saves anything."""

    is_held_in_precopy = False
    has_journal = False
    is_repeatable = False

    def evidence_source(self, *, has_evidence: bool) -> EvidenceSource:
        """Return the guest, which has used its write-once pages before it was paused."""
        return EvidenceSource.STILL

    async def use_write_once_pages(self, attempt: Attempt) -> None:
        """Have the guest use all its write-once pages.

        Raises:
            UntestableError: the guest does not.
        """
        guest = attempt.pair.source_guest
        await guest.send(START_WRITE_ONCE)
        await guest.wait_for(lambda: "write-once-done" in guest.latest, "used its write-once pages")

    async def prepare(self, attempt: Attempt) -> None:
        """Have the guest use its write-once pages."""
        await self.use_write_once_pages(attempt)
        await super().prepare(attempt)

    async def migrate(self, attempt: Attempt) -> None:
        """Migrate, without the guest."""
        await attempt.migration.start()
        async for _ in attempt.follow():
            pass
        await attempt.migration.load()


class CprReboot(_GuestPaused):
    """The guest is saved into a file and restored, as around a reboot of its host."""

    name = "cpr-reboot"
    summary = "The guest is paused, saved into a file and restored, as around a reboot of the host"
    transport = FILE
    parameters: Mapping[str, Any] = {"mode": "cpr-reboot"}


class _MemoryKept(_GuestPaused):
    """The guest's memory stays when the source's QEMU ends; the destination starts late."""

    added = Hardware(machine_options=",aux-ram-share=on")

    async def start(self, pair: QemuPair) -> None:
        """Start the source alone, and wait until its guest is ready."""
        try:
            await pair.guarded(pair.start_source())
        except QmpTimeoutError:
            raise
        except QmpError as error:
            raise self.explain_refusal(str(error)) from error
        await pair.guarded(pair.boot())

    def require_memory(self, backend: MemoryBackend) -> None:
        """Refuse a file without a name, which QEMU cannot open again.

        Raises:
            UsageError: the memory is in such a file.
        """
        if backend.folder is not None:
            raise UsageError(
                f"--scenario {self.name}: the new QEMU cannot open the source's file, because the "
                "file has no name; use another --memory-backend"
            )

    def configured(self, ends: Ends) -> Sequence[Qmp]:
        """Return the source only, because the destination does not answer yet."""
        return (ends.source,)


class CprTransfer(_MemoryKept):
    """The source sends the memory's file descriptors to the destination over a second channel."""

    name = "cpr-transfer"
    summary = "The guest is paused; the destination gets its memory by file descriptor, not a copy"
    parameters: Mapping[str, Any] = {"mode": "cpr-transfer"}

    async def prepare(self, attempt: Attempt) -> None:
        """Launch a destination that first waits for the source's file descriptors."""
        await self.use_write_once_pages(attempt)
        pair = attempt.pair
        await pair.launch_destination("-incoming", json.dumps(channel(pair.folder, "cpr")))
        await pair.wait_for_socket(channel_path(pair.folder, "cpr"))
        attempt.joined = pair.destination.connect

    async def begin(self, ends: Ends) -> None:
        """Send the file descriptors, and then have the destination read the stream."""
        assert ends.joined is not None
        main, descriptors = (channel(ends.folder, kind) for kind in ("main", "cpr"))
        await ends.source.execute("migrate", channels=[main, descriptors])
        await ends.joined()
        await ends.destination.execute("migrate-incoming", channels=[main])

    def require_arrival(self, source: Sequence[RamFile], destination: Sequence[RamFile]) -> None:
        """Check that both QEMUs have the same memory.

        Raises:
            UntestableError: their memory is not the same.
        """
        _require_same_memory(source, destination)


_MOST_STATE_BYTES: Final = 4 << 20
"""More than the state of all devices with their small memories, and less than the guest's RAM."""


class IgnoreShared(_GuestPaused):
    """Both QEMUs have the guest's RAM in one file, and QEMU sends only the devices' state."""

    name = "ignore-shared"
    summary = "The guest is paused; both QEMUs have its RAM in one file, which QEMU does not send"
    capabilities = ("x-ignore-shared",)
    downtime_is_measurable = False

    async def start(self, pair: QemuPair) -> None:
        """Start both QEMUs with the same file, and wait until the source's guest is ready."""
        pair.share_ram()
        await super().start(pair)

    async def prepare(self, attempt: Attempt) -> None:
        """Have the guest use its write-once pages, and pause the guest."""
        await super().prepare(attempt)
        await attempt.pair.source.qmp.execute("stop")

    async def migrate(self, attempt: Attempt) -> None:
        """Migrate, and check that QEMU has not sent the RAM.

        Raises:
            UntestableError: the migration failed, or QEMU has sent the RAM.
        """
        await super().migrate(attempt)
        sent = attempt.migration.history[-1].transferred or 0
        if sent > _MOST_STATE_BYTES:
            raise UntestableError(
                f"expected QEMU to send only the devices' state, but QEMU has sent {sent} bytes"
            )

    def require_memory(self, backend: MemoryBackend) -> None:
        """Refuse any kind of memory, because the scenario itself chooses the file.

        Raises:
            UsageError: a kind was chosen.
        """
        if backend != MEMFD:
            raise UsageError(
                f"--scenario {self.name} puts the RAM of both sides into one file of its own; "
                "leave out --memory-backend"
            )

    def require_arrival(self, source: Sequence[RamFile], destination: Sequence[RamFile]) -> None:
        """Check that both QEMUs have the same memory.

        Raises:
            UntestableError: their memory is not the same.
        """
        _require_same_memory(source, destination)


def _require_same_memory(source: Sequence[RamFile], destination: Sequence[RamFile]) -> None:
    if [ram.inode for ram in source] != [ram.inode for ram in destination]:
        raise UntestableError(
            "expected the destination to use the source's memory, but QEMU has copied it"
        )


_SUCCESSOR_SOCKET: Final = "successor-qmp.sock"


class CprExec(_MemoryKept):
    """The source's process executes QEMU again and keeps the memory."""

    name = "cpr-exec"
    summary = "The guest is paused; the source's process executes QEMU again and keeps the memory"
    transport = FILE
    parameters: Mapping[str, Any] = {"mode": "cpr-exec"}

    is_over_when_begun = True
    downtime_is_measurable = False
    stops_rings = False

    def require_qemus(self, source: Path, destination: Path) -> None:
        """Refuse another QEMU on the destination, which the source's process would not execute.

        Raises:
            UnsupportedError: the QEMUs are not the same file.
        """
        if destination.resolve() != source.resolve():
            raise UnsupportedError(
                f"--qemu-destination {destination}: --scenario {self.name} executes the source's "
                f"{source} again, and no other QEMU; leave out --qemu-destination, or choose "
                "--scenario cpr-transfer"
            )

    async def prepare(self, attempt: Attempt) -> None:
        """Set the command that the source executes, and copy its RAM before QEMU changes it.

        Raises:
            UnsupportedScenarioError: the source does not support the parameter.
            UntestableError: the guest or a QEMU fails.
        """
        await self.use_write_once_pages(attempt)
        pair = attempt.pair
        pair.plan_successor()
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
        """Have the source save its state and execute QEMU, which loads the state at once."""
        assert ends.joined is not None
        await ends.source.execute("migrate", uri=await self.transport.written_to(ends))
        await ends.joined()

    async def load(self, ends: Ends) -> None:
        """Do nothing: the new QEMU loads by its command line."""

    def source_afterwards(self, pair: QemuPair) -> Qemu:
        """Return the new QEMU, because the old one has ended."""
        return pair.destination


async def _successor_command(pair: QemuPair) -> list[str]:
    """Return the source's command with a new QMP socket and the destination's device arguments.

    The old socket cannot be used: a QMP client does not expect a second greeting in its stream.
    """
    command = list(pair.source.process.command)
    place = next(i for i, word in enumerate(command) if word.startswith("socket,id=qmp,"))
    path = option_value(_successor_socket(pair))
    command[place] = f"socket,id=qmp,path={path},server=on,wait=off"
    attached = pair.attached[pair.source_side]
    place = command.index(attached[0])
    while command[place : place + len(attached)] != attached:
        place = command.index(attached[0], place + 1)
    command[place : place + len(attached)] = await pair.attach_device(pair.destination_side)
    return command


def _successor_socket(pair: QemuPair) -> Path:
    return pair.folder / _SUCCESSOR_SOCKET


async def _connect_successor(pair: QemuPair) -> None:
    await pair.wait_for_socket(_successor_socket(pair))
    await pair.source.qmp.close()
    await pair.destination.qmp.connect(str(_successor_socket(pair)))
