"""The interface of a proof's device.

A `ProofDevice` is plain data from a set-up, which can be started any number of times. The started
device is an `AttachedDevice`: the processes that serve the two QEMUs, the arguments of each QEMU,
and the evidence after the migration. One object may also represent several devices of a guest.

Both classes have defaults, so a new kind of device overrides only what is different::

    @dataclass(frozen=True)
    class NullDisk(ProofDevice):
        @property
        def facts(self) -> DeviceFacts:
            return DeviceFacts("null", queues=1)

        @property
        def guests(self) -> Collection[str]:
            return ("linux",)

        @asynccontextmanager
        async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
            yield AttachedNullDisk()
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from dmaproof.errors import UntestableError
from dmaproof.evidence import Evidence

from ..guest.channel import GuestChannel
from ..guest.drivers import Driver
from ..guest.workload import Workload
from ..host.process import Process


@dataclass(frozen=True)
class DeviceFacts:
    """The facts of a device in reports; None for what the device does not have."""

    device: str
    queues: int
    ring: str | None = None
    tracker: str | None = None
    harvest: str | None = None
    fault: str | None = None
    killed: bool = False
    destination_killed: bool = False


class ProofDevice(ABC):
    """A device in a set-up, not started yet."""

    @property
    @abstractmethod
    def facts(self) -> DeviceFacts:
        """The facts in reports."""

    @property
    @abstractmethod
    def guests(self) -> Collection[str]:
        """The guests that drive it: names in `guest.choice.GUESTS`, or `guest.own.OWN_GUEST`."""

    @property
    def driver(self) -> Driver:
        """The Linux guest's driver for it; by default none."""
        return Driver((), "")

    @property
    def direct(self) -> bool:
        """Whether it writes to the memory of the Linux guest's program, not to its kernel's
        buffers. The bare guest has no kernel."""
        return True

    @property
    def commands(self) -> Sequence[Sequence[str]]:
        """The words of each third-party command that serves the device."""
        return ()

    def adapt(self, workload: Workload) -> Workload:
        """Return `workload` without the parts that this device cannot carry out."""
        return workload

    def prerequisites(self, memory_bytes: int) -> Sequence[str]:
        """Check the prerequisites of a proof with `memory_bytes` of RAM on this machine.

        Returns:
            Lines about the prerequisites and what was found.

        Raises:
            UntestableError: prerequisites are missing; the message lists them all and how to fix
                them.
        """
        return ()

    @abstractmethod
    def start(self, folder: Path, timeout_s: float) -> AbstractAsyncContextManager[AttachedDevice]:
        """Start the device's processes, with sockets and logs in the run's `folder`.

        `timeout_s` bounds each wait for the device.

        Raises:
            UntestableError: the device does not start.
        """


class AttachedDevice(ABC):
    """A device that has been started. `side` is `SOURCE` or `DESTINATION` (`qemu.machine`).

    By default the device has no process of its own and keeps no journal.
    """

    @property
    def processes(self) -> Sequence[Process]:
        """The device's own processes, none of which may end before the proof does."""
        return ()

    def serving(self, side: str) -> Sequence[Process]:
        """Return the device's processes that serve the QEMU of `side`."""
        return ()

    @abstractmethod
    async def attach(self, side: str) -> Sequence[str]:
        """Get ready for a QEMU that is about to be started as `side`.

        After `release`, a side may attach again: a cancelled migration has a second destination.

        Returns:
            The device's arguments for that QEMU.

        Raises:
            UntestableError: the process that serves the QEMU does not start.
        """

    def release(self, side: str) -> None:  # noqa: B027 (a default, not a gap)
        """Allow the processes that serve only the QEMU of `side` to end, as that QEMU ends next."""

    def check_guest(self, guest: GuestChannel) -> None:  # noqa: B027
        """Check that the guest, which is ready, uses the device as its set-up says.

        Raises:
            UntestableError: it does not.
        """

    def migrates_from(self, side: str) -> None:  # noqa: B027
        """Take note that the QEMU of `side` is about to migrate."""

    @property
    def is_killed(self) -> bool:
        """Whether `inject_restart` kills and restarts the device."""
        return False

    async def inject_restart(self, side: str) -> None:  # noqa: B027
        """Kill and restart the device during the migration from `side`, if it `is_killed`.

        Raises:
            UntestableError: the device does not survive the restart.
        """

    @property
    def is_killed_on_destination(self) -> bool:
        """Whether the proof kills and starts the device again after the migration."""
        return False

    async def kill(self, side: str) -> None:  # noqa: B027
        """Kill the device's process that serves the QEMU of `side`; `start_again` must follow."""

    async def start_again(self, side: str) -> None:  # noqa: B027
        """Start the device of `side` again after `kill`.

        Raises:
            UntestableError: the device does not start.
        """

    async def refusal(self) -> UntestableError:
        """Wait until the device refuses data of a QEMU or its guest; for ever if it does not."""
        future: asyncio.Future[UntestableError] = asyncio.get_running_loop().create_future()
        return await future

    async def logging_ended(self, side: str) -> None:  # noqa: B027
        """Wait until the QEMU of `side` has removed its dirty log from the device.

        A device that cannot know this does not wait.

        Raises:
            UntestableError: QEMU does not remove the log.
        """

    def accepted_features(self, side: str) -> int | None:
        """Return the virtio features (bits) that the driver of `side` uses; None if unknown."""
        return None

    async def evidence(self, side: str) -> Sequence[Evidence]:
        """Return the evidence of the device's writes to the RAM of `side`.

        Several devices return one `Evidence` each, with the device's name. A device without a
        journal returns none.

        Raises:
            UntestableError: a device with a journal cannot return its evidence.
        """
        return []


def on_image(workload: Workload) -> Workload:
    """Return the workload for an image file, whose content is the same at every read."""
    return replace(workload, image=1)


def on_network(workload: Workload) -> Workload:
    """Return the workload for a network that sends every frame back and stores nothing."""
    return replace(workload, write_every=0, huge_every=0, unaligned_every=0)
