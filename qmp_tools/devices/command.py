"""Somebody else's vhost-user back end in our device's place: one process for each side.

It keeps no journal, so who lost a page stays open. A disk is an image file with stamped pages, and
a network is to send back what it gets; so the guest can check whatever comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import socket
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError, WaitTimeoutError

from ..guest.linux import VIRTIO_BLK, VIRTIO_NET, VIRTIOFS, Driver
from ..guest.workload import Workload
from ..host.process import Process, ProcessDiedError
from ..host.timeout import wait_until
from ..qemu.machine import (
    vhost_user_blk_arguments,
    vhost_user_fs_arguments,
    vhost_user_net_arguments,
)
from .device import AttachedDevice, DeviceFacts, ProofDevice, on_image, on_network
from .disk_image import write_image

_LAST_SHARE: Final = 4
"""One of so many write-once pages is written while the migration ends. What a device forgets to mark when
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
class CommandDevice(ProofDevice):
    """`words` are a command's, with placeholders; see `parse_command`."""

    kind: str
    words: Sequence[str]
    queues: int = 2

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(f"{self.kind} by {Path(self.words[0]).name}", self.queues)

    @property
    def guests(self) -> Collection[str]:
        return KINDS[self.kind].guests

    @property
    def driver(self) -> Driver:
        return KINDS[self.kind].driver

    @property
    def direct(self) -> bool:
        return not KINDS[self.kind].network

    @property
    def commands(self) -> Sequence[Sequence[str]]:
        return [self.words]

    def adapt(self, workload: Workload) -> Workload:
        if KINDS[self.kind].network:
            return on_network(workload)
        return replace(on_image(workload), last=workload.write_once // _LAST_SHARE)

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
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


class _Attached(AttachedDevice):
    def __init__(self, setup: CommandDevice, folder: Path, shared: Path, timeout_s: float) -> None:
        self._setup = setup
        self._folder = folder
        self._shared = shared
        self._timeout_s = timeout_s
        self._backends: dict[str, Process] = {}
        self._news = asyncio.Condition()

    @property
    def processes(self) -> Sequence[Process]:
        return tuple(self._backends.values())

    def serving(self, side: str) -> Sequence[Process]:
        return [self._backends[side]] if side in self._backends else []

    async def attach(self, side: str) -> Sequence[str]:
        path = self._folder / f"{side}-disk.sock"
        if side in self._backends:  # what it left must not be taken for what is to come
            await self._backends[side].end()
            path.unlink(missing_ok=True)
        values = {
            "socket": path,
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
        async with self._news:
            self._backends[side] = backend
            self._news.notify_all()

        def late() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"{backend.name} has not listened on {path} within {self._timeout_s:g} s\n"
                f"{backend.log_tail()}".rstrip()
            )

        async def is_ready() -> bool:
            if listens(path, backend.pid):
                return True
            if backend.died.done():
                raise await backend.missed()
            return False

        await wait_until(is_ready, self._timeout_s, late)
        return KINDS[self._setup.kind].arguments(path, self._setup.queues)

    async def refusal(self) -> ProcessDiedError:
        """Wait until a back end ends unexpectedly, also one that is started meanwhile."""
        while True:
            backends = list(self._backends.values())
            missed = [asyncio.ensure_future(it.missed()) for it in backends]
            another = asyncio.ensure_future(self._other_than(backends))
            try:
                await asyncio.wait([*missed, another], return_when=asyncio.FIRST_COMPLETED)
                for future in missed:
                    if future.done():
                        return future.result()
            finally:
                for waiting in (*missed, another):
                    waiting.cancel()

    async def _other_than(self, backends: Sequence[Process]) -> None:
        async with self._news:
            while backends == list(self._backends.values()):
                await self._news.wait()

    def release(self, side: str) -> None:
        self._backends[side].expect_end()

    async def end(self) -> None:
        """End all back ends."""
        await asyncio.gather(*(backend.end() for backend in self._backends.values()))


def listens(path: Path, pid: int) -> bool:
    """Whether process `pid`, or one that it has started, accepts connections at `path`.

    No connection is made, as some back ends take only a single one. A socket of another type is
    refused without one, and the reason tells whether some process still has the file's socket open,
    whatever its network namespace is (unix_find_bsd in the kernel).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        error = probe.connect_ex(os.fspath(path))
    if error not in (errno.EPROTOTYPE, errno.EACCES):  # ECONNREFUSED: the file was left behind
        return False
    for seen_from in ("self", pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{seen_from}/net/unix").read_text().splitlines()[1:]:
                fields = line.split(maxsplit=7)  # address, count, protocol, flags, …, path
                if fields[7:] == [os.fspath(path)]:
                    return bool(int(fields[3], 16) & _ACCEPTS_CONNECTIONS)
    return error == errno.EPROTOTYPE  # a namespace that is not seen: bound is all that is known
