"""The device of a proof: what a proof asks of it, whoever made it.

A `ProofDevice` is what a set-up names: plain data, from which the same can be started any number of
times. Started, it is an `AttachedDevice`: the processes that serve the two QEMUs, what each QEMU is
told on its command line, and what there is of evidence afterwards. A device may be several: one
object stands for all that the guest of a proof is given.

Both have defaults, so a new kind of device says only what is special about it::

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

from ..guest.linux import Driver
from ..guest.workload import Workload
from ..host.process import Process


@dataclass(frozen=True)
class DeviceFacts:
    """What reports tell of a device; None where it has no such thing."""

    device: str
    queues: int
    ring: str | None = None
    tracker: str | None = None
    harvest: str | None = None
    fault: str | None = None
    killed: bool = False


class ProofDevice(ABC):
    """A device as a set-up names it."""

    @property
    @abstractmethod
    def facts(self) -> DeviceFacts:
        """What reports tell of it."""

    @property
    @abstractmethod
    def guests(self) -> Collection[str]:
        """The guests (`guest.choice.GUESTS`) that have a driver for it, or `guest.own.NAME`."""

    @property
    def driver(self) -> Driver:
        """The one by which the Linux guest comes to it; by default none of ours."""
        return Driver((), "")

    @property
    def direct(self) -> bool:
        """Whether it writes where the guest's program asks it to, not into its kernel's buffers."""
        return True

    @property
    def commands(self) -> Sequence[Sequence[str]]:
        """The words of each command that serves it, but for dmaproof's own and QEMU's."""
        return ()

    def adapt(self, workload: Workload) -> Workload:
        """The workload, as far as it can be carried out on this device."""
        return workload

    def prerequisites(self, memory_bytes: int) -> Sequence[str]:
        """Lines about what a proof with so much RAM needs of this machine, and what exists.

        Raises:
            UntestableError: something is missing; the message has all of it, with its remedy.
        """
        return ()

    @abstractmethod
    def start(self, folder: Path, timeout_s: float) -> AbstractAsyncContextManager[AttachedDevice]:
        """What it runs besides QEMU; its sockets and logs are in the run's `folder`.

        `timeout_s` bounds each wait for it.

        Raises:
            UntestableError: it does not start.
        """


class AttachedDevice(ABC):
    """A device that has been started. `side` is `SOURCE` or `DESTINATION` (`qemu.machine`).

    By default it runs no process of its own, and reports nothing of itself.
    """

    @property
    def processes(self) -> Sequence[Process]:
        """Its own processes, none of which may end before the proof does."""
        return ()

    def serving(self, side: str) -> Sequence[Process]:
        """Those of its processes that serve the QEMU of `side`."""
        return ()

    @abstractmethod
    async def attach(self, side: str) -> Sequence[str]:
        """Be ready for a QEMU that is about to be started as `side`; returns its arguments.

        A side may come again, after it was released: a cancelled migration has a second
        destination.

        Raises:
            UntestableError: what is to serve it does not start.
        """

    @property
    def lacks_pagefault(self) -> bool:
        """Whether it is a vhost-user device that is known to lack VHOST_USER_PROTOCOL_F_PAGEFAULT:
        with one of these, QEMU must refuse postcopy."""
        return False

    def release(self, side: str) -> None:  # noqa: B027 (a default, not a gap)
        """The QEMU of `side` is about to be ended: what serves only that may end by itself now."""

    async def inject_restart(self, side: str) -> None:  # noqa: B027
        """Do to the device what its set-up says, in the middle of the migration from `side`.

        Raises:
            UntestableError: it does not survive that as it should.
        """

    async def refusal(self) -> UntestableError:
        """Wait until it refuses what a QEMU or its guest sent, for ever if it does not."""
        future: asyncio.Future[UntestableError] = asyncio.get_running_loop().create_future()
        return await future

    async def logging_ended(self, side: str) -> None:  # noqa: B027
        """Wait until the QEMU of `side` has taken its dirty log back; not if that cannot be told.

        Raises:
            UntestableError: it does not.
        """

    def accepted_features(self, side: str) -> int | None:
        """The virtio features (bits) that the driver of `side` uses; None if that is not known."""
        return None

    async def evidence(self, side: str) -> Sequence[Evidence]:
        """What it knows of its own writes to the RAM of `side`; none if it keeps no journal.

        Several devices have one each, by name.

        Raises:
            UntestableError: it should know, and cannot tell.
        """
        return []


def on_image(workload: Workload) -> Workload:
    """The workload on an image file, whose content is the same whenever it is read."""
    return replace(workload, image=1)


def on_network(workload: Workload) -> Workload:
    """The workload on a network that sends back what it gets, and keeps nothing."""
    return replace(workload, write_every=0, huge_every=0, unaligned_every=0)
