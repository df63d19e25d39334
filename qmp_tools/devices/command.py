"""Use a third party's vhost-user back end instead of dmaproof's device: one process for each side.

The back end keeps no journal, so a proof cannot say who lost a page. A disk is an image file with
stamped pages, and a network must send every frame back, so that the guest can check all data.
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

from ..guest.drivers import VIRTIO_BLK, VIRTIO_NET, VIRTIOFS, Driver
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
"""One in this many write-once pages is written while the migration ends. If a device that is
stopped forgets to mark pages, these are the pages that it has written last."""
_ACCEPTS_CONNECTIONS: Final = 1 << 16
"""__SO_ACCEPTCON, as /proc/net/unix shows it among a socket's flags."""


@dataclass(frozen=True)
class _Kind:
    """A QEMU device with an external back end; `arguments` takes socket and number of queues."""

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
    """A device that a command serves: its `words` with placeholders (see `parse_command`)."""

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
    """Split a command line that is quoted as for a shell, though no shell runs it.

    Returns:
        The words of the command, with placeholders.

    Raises:
        UsageError: `text` is not a valid command line, has an unknown placeholder, or does not
            name {socket}.
    """
    try:
        words = shlex.split(text.replace("\\\n", ""))  # lines may be continued
        for word in words:
            word.format(**dict.fromkeys(_PLACEHOLDERS, ""))
    except (ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"--device-command {text!r}: {error}; the placeholders are "
            f"{', '.join('{' + name + '}' for name in _PLACEHOLDERS)}; write other braces twice"
        ) from None
    if not any("{socket}" in word for word in words):
        raise UsageError(
            f"--device-command {text!r}: {{socket}} is missing; pass it to the back end as the "
            "path of the socket on which to listen for QEMU"
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
        self._changed = asyncio.Condition()

    @property
    def processes(self) -> Sequence[Process]:
        return tuple(self._backends.values())

    def serving(self, side: str) -> Sequence[Process]:
        return [self._backends[side]] if side in self._backends else []

    async def attach(self, side: str) -> Sequence[str]:
        path = self._folder / f"{side}-disk.sock"
        if side in self._backends:  # the old back end's socket must not be taken for the new one's
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
        async with self._changed:
            self._backends[side] = backend
            self._changed.notify_all()

        def late() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"the {backend.name} does not listen on {path} after {self._timeout_s:g} s; check "
                f"--device-command, or allow more time (--timeout)\n{backend.log_tail()}".rstrip()
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
        """Wait until a back end ends unexpectedly, even one that is started meanwhile."""
        while True:
            backends = list(self._backends.values())
            missed = [asyncio.ensure_future(backend.missed()) for backend in backends]
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
        async with self._changed:
            while backends == list(self._backends.values()):
                await self._changed.wait()

    def release(self, side: str) -> None:
        self._backends[side].expect_end()

    async def end(self) -> None:
        """End all back ends."""
        await asyncio.gather(*(backend.end() for backend in self._backends.values()))


def listens(path: Path, pid: int) -> bool:
    """Return whether process `pid`, or one that it has started, accepts connections at `path`.

    The function makes no connection, because some back ends accept only one. It connects a socket
    of another type, which the kernel refuses. The error says whether a process in any network
    namespace still has the file's socket open (unix_find_bsd in the kernel).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        error = probe.connect_ex(os.fspath(path))
    if error not in (errno.EPROTOTYPE, errno.EACCES):  # ECONNREFUSED: only the file is left
        return False
    for process in ("self", pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/net/unix").read_text().splitlines()[1:]:
                fields = line.split(maxsplit=7)  # address, count, protocol, flags, …, path
                if fields[7:] == [os.fspath(path)]:
                    return bool(int(fields[3], 16) & _ACCEPTS_CONNECTIONS)
    return error == errno.EPROTOTYPE  # in a hidden namespace: it is only known to be bound
