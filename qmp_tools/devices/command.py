"""Somebody else's vhost-user back end in our device's place: one process for each side.

It keeps no journal, so who lost a page stays open. A disk is an image file with stamped pages, and
a network is to send back what it gets; so the guest can check whatever comes.
"""

from __future__ import annotations

import asyncio
import shlex
import stat
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError, WaitTimeoutError

from ..guest.linux import VIRTIO_BLK, VIRTIO_NET, VIRTIOFS, Driver
from ..guest.workload import Workload
from ..processes.machine import (
    vhost_user_blk_arguments,
    vhost_user_fs_arguments,
    vhost_user_net_arguments,
)
from ..processes.process import Process
from ..processes.timeout import bounded
from .device import AttachedDevice, DeviceFacts, SilentDevice, on_image, on_network
from .disk_image import write_image

_POLL_S: Final = 0.01
_LAST_SHARE: Final = 4
"""One of so many once pages is written while the migration ends. What a device forgets to mark when
it is stopped are the pages that it has written last."""
_ACCEPTS_CONNECTIONS: Final = 1 << 16
"""__SO_ACCEPTCON, as /proc/net/unix shows it among a socket's flags."""


@dataclass(frozen=True)
class _Kind:
    """A device of QEMU's that a back end can stand behind; `arguments` takes socket and queues."""

    arguments: Callable[[Path, int], list[str]]
    guests: Collection[str]
    driver: Driver
    network: bool = False


KINDS: Final = {
    "blk": _Kind(vhost_user_blk_arguments, ("bare", "linux"), VIRTIO_BLK),
    "fs": _Kind(lambda socket, queues: vhost_user_fs_arguments(socket), ("linux",), VIRTIOFS),
    "net": _Kind(
        lambda socket, queues: vhost_user_net_arguments(socket),
        ("linux",),
        VIRTIO_NET,
        network=True,
    ),
}


@dataclass(frozen=True)
class CommandDevice:
    """See `ProofDevice`. `words` are a command's, with placeholders; see `parse_command`."""

    kind: str
    words: Sequence[str]
    queues: int = 2

    @property
    def facts(self) -> DeviceFacts:
        """See `ProofDevice.facts`."""
        return DeviceFacts(f"{self.kind} by {Path(self.words[0]).name}", self.queues)

    @property
    def guests(self) -> Collection[str]:
        """See `ProofDevice.guests`."""
        return KINDS[self.kind].guests

    @property
    def driver(self) -> Driver:
        """See `ProofDevice.driver`."""
        return KINDS[self.kind].driver

    @property
    def direct(self) -> bool:
        """See `ProofDevice.direct`."""
        return not KINDS[self.kind].network

    @property
    def commands(self) -> Sequence[Sequence[str]]:
        """See `ProofDevice.commands`."""
        return [self.words]

    def fit(self, workload: Workload) -> Workload:
        """See `ProofDevice.fit`."""
        if KINDS[self.kind].network:
            return on_network(workload)
        return replace(on_image(workload), last=workload.once // _LAST_SHARE)

    def with_fault(self, fault: str) -> CommandDevice:
        """See `ProofDevice.with_fault`."""
        raise UsageError(f"{fault} cannot be planted in somebody else's device")

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        """See `ProofDevice.start`."""
        shared = folder / "shared"
        shared.mkdir()
        write_image(shared / "disk")
        attached = _Attached(self, folder, shared, timeout_s)
        try:
            yield attached
        finally:
            await attached.end()


def parse_command(text: str) -> Sequence[str]:
    """The words of a command line, quoted as for a shell; no shell reads them.

    Raises:
        UsageError: it is no command line, or a placeholder in it is not known.
    """
    try:
        words = shlex.split(text.replace("\\\n", ""))  # lines may be continued
        for word in words:
            word.format(**dict.fromkeys(_PLACEHOLDERS, ""))
    except (ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"--device-command {text!r}: {error}; placeholders are "
            f"{', '.join('{' + name + '}' for name in _PLACEHOLDERS)}, and braces are doubled"
        ) from None
    if not any("{socket}" in word for word in words):
        raise UsageError(
            f"--device-command {text!r}: it must name {{socket}}, where QEMU will connect"
        )
    return words


_PLACEHOLDERS: Final = ("socket", "side", "image", "folder", "queues")


class _Attached(SilentDevice):
    def __init__(self, setup: CommandDevice, folder: Path, shared: Path, timeout_s: float) -> None:
        self._setup = setup
        self._folder = folder
        self._shared = shared
        self._timeout_s = timeout_s
        self._backends: dict[str, Process] = {}

    @property
    def processes(self) -> Sequence[Process]:
        return tuple(self._backends.values())

    def serving(self, side: str) -> Sequence[Process]:
        return [self._backends[side]] if side in self._backends else []

    async def attach(self, side: str) -> Sequence[str]:
        socket = self._folder / f"{side}-disk.sock"
        if side in self._backends:  # what it left must not be taken for what is to come
            await self._backends[side].end()
            socket.unlink(missing_ok=True)
        values = {
            "socket": socket,
            "side": side,
            "image": self._shared / "disk",
            "folder": self._shared,
            "queues": self._setup.queues,
        }
        backend = await Process.start(
            f"{side} device",
            [word.format(**values) for word in self._setup.words],
            self._folder / f"{side}-device.log",
            run_folder=self._folder,
        )
        self._backends[side] = backend

        def late() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"{backend.name} has not listened on {socket} within {self._timeout_s:g} s\n"
                f"{backend.log_tail()}".rstrip()
            )

        async with bounded(self._timeout_s, late):
            while not listens(socket):
                if backend.died.done():
                    raise await backend.missed()
                await asyncio.sleep(_POLL_S)
        return KINDS[self._setup.kind].arguments(socket, self._setup.queues)

    def release(self, side: str) -> None:
        self._backends[side].expect_end()

    async def end(self) -> None:
        """End all back ends."""
        await asyncio.gather(*(backend.end() for backend in self._backends.values()))


def listens(socket: Path) -> bool:
    """Whether connections are accepted there; found out without making one, for some back ends take
    only a single one."""
    try:
        if not stat.S_ISSOCK(socket.stat().st_mode):
            return False
    except FileNotFoundError:
        return False
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()  # address, count, protocol, flags, type, state, inode, path
        if fields[-1] == str(socket):
            return bool(int(fields[3], 16) & _ACCEPTS_CONNECTIONS)
    return True  # it is of another network namespace: its own word is all there is
