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
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UnsupportedError, UsageError, WaitTimeoutError
from dmaproof.vhost_user.features import F_ACCESS_PLATFORM, F_RING_PACKED

from ..guest.channel import GuestChannel
from ..guest.drivers import VIRTIO_BLK, VIRTIO_NET, VIRTIO_SCSI, VIRTIOFS, Driver
from ..guest.workload import Workload
from ..host.process import Process, ProcessDiedError
from ..host.timeout import wait_until
from ..qemu.machine import option_value
from ..qemu.pci_express import behind_iommu, device_port
from ..qemu.reconnection import RECONNECT
from .device import AttachedDevice, DeviceFacts, ProofDevice, on_image, on_network
from .disk_image import write_image
from .udp_echo import udp_echo

_LAST_SHARE: Final = 4
"""One in this many write-once pages is written while the migration ends. If a device that is
stopped forgets to mark pages, these are the pages that it has written last."""
_PORT: Final = 1
"""The number of the root port that a device behind an IOMMU needs."""
_ACCEPTS_CONNECTIONS: Final = 1 << 16
"""__SO_ACCEPTCON, as /proc/net/unix shows it among a socket's flags."""


@dataclass(frozen=True)
class _Kind:
    """A QEMU device with an external back end: `device` is the value of ``-device``.

    `virtio_type` is the number of the device type (virtio 1.2, section 5).
    """

    device: str
    virtio_type: int
    guests: Collection[str]
    driver: Driver
    network: bool = False
    carries_only_ip: bool = False
    restartable: bool = True


_NET: Final = _Kind("virtio-net-pci,netdev=net", 1, ("bare", "linux"), VIRTIO_NET, network=True)
KINDS: Final = {
    "blk": _Kind(
        "vhost-user-blk-pci,chardev=device,num-queues={queues},queue-size=128",
        2,
        ("bare", "linux"),
        VIRTIO_BLK,
    ),
    "fs": _Kind(
        "vhost-user-fs-pci,chardev=device,tag=disk", 26, ("linux",), VIRTIOFS, restartable=False
    ),
    "net": _NET,
    "net-udp": replace(_NET, guests=("linux",), carries_only_ip=True),
    "scsi": _Kind(
        "vhost-user-scsi-pci,chardev=device,num_queues={queues},virtqueue_size=128",
        8,
        ("bare", "linux"),
        VIRTIO_SCSI,
    ),
}
NOT_MIGRATED: Final = frozenset(
    ("gpio", "gpu", "i2c", "input", "rng", "rtc", "scmi", "snd", "spi", "vsock")
)
"""The devices ``vhost-user-NAME-pci`` that no QEMU up to 11.1 migrates."""


@dataclass(frozen=True)
class CommandDevice(ProofDevice):
    """A device that a command serves: its `words` with placeholders (see `parse_command`).

    It has `queues` virtqueues of the form `ring` (one of `emulated.RINGS`), and may be
    `behind_iommu`. If `killed`, its back end is killed during the migration and started again; if
    `destination_killed`, the destination's back end is, after the migration. If its network carries
    only IP, it must forward the guest's datagrams to `udp_port` of this host, where dmaproof sends
    them back.
    """

    kind: str
    words: Sequence[str]
    queues: int = 2
    ring: str = "split"
    behind_iommu: bool = False
    killed: bool = False
    destination_killed: bool = False
    udp_port: int = 0

    def __post_init__(self) -> None:
        if self._restarts and not KINDS[self.kind].restartable:
            flag = "--kill-device" if self.killed else "--kill-destination-device"
            raise UsageError(
                f"{flag}: QEMU does not connect again to the back end of --device "
                f"{self.kind}; choose another device"
            )

    @property
    def _restarts(self) -> bool:
        return self.killed or self.destination_killed

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            f"{self.kind} by {Path(self.words[0]).name}",
            self.queues,
            self.ring,
            killed=self.killed,
            destination_killed=self.destination_killed,
        )

    def qemu_arguments(self, socket: Path) -> list[str]:
        """Return the QEMU arguments of the device whose back end listens at `socket`."""
        kind = KINDS[self.kind]
        device = [kind.device.format(queues=self.queues)]
        if self.ring == "packed":
            device.append("packed=on")
        if self.behind_iommu:
            device += behind_iommu(_PORT)
        reconnect = f",{RECONNECT}" if self._restarts else ""
        return [
            *(device_port(_PORT) if self.behind_iommu else ()),
            *("-chardev", f"socket,id=device,path={option_value(socket)}{reconnect}"),
            *(("-netdev", "vhost-user,id=net,chardev=device") if kind.network else ()),
            *("-device", ",".join(device)),
        ]

    def required_features(self) -> Mapping[str, int]:
        """Return the virtio features (bits) that the guest's driver must use, by virtio's names."""
        features = {}
        if self.ring == "packed":
            features["VIRTIO_F_RING_PACKED"] = F_RING_PACKED
        if self.behind_iommu:
            features["VIRTIO_F_ACCESS_PLATFORM"] = F_ACCESS_PLATFORM
        return features

    @property
    def guests(self) -> Collection[str]:
        return KINDS[self.kind].guests

    @property
    def driver(self) -> Driver:
        kind = KINDS[self.kind]
        if kind.carries_only_ip:
            return replace(kind.driver, place=f"{kind.driver.place} echo={self.udp_port}")
        return kind.driver

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
        async with contextlib.AsyncExitStack() as ended_last:
            if KINDS[self.kind].carries_only_ip:
                await ended_last.enter_async_context(udp_echo(self.udp_port))
            ended_last.push_async_callback(attached.end)
            yield attached


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
        if side in self._backends:
            await self._backends[side].end()
        return self._setup.qemu_arguments(await self._start(side))

    @property
    def is_killed(self) -> bool:
        return self._setup.killed

    async def inject_restart(self, side: str) -> None:
        if self._setup.killed:
            await self.kill(side)
            await self.start_again(side)
            self._backends[side].allow_success()

    @property
    def is_killed_on_destination(self) -> bool:
        return self._setup.destination_killed

    async def kill(self, side: str) -> None:
        await self._backends[side].kill()

    async def start_again(self, side: str) -> None:
        await self._start(side)

    async def _start(self, side: str) -> Path:
        """Start the back end of `side`; return the path of the socket on which it listens."""
        path = self._folder / f"{side}-disk.sock"
        path.unlink(missing_ok=True)  # of an old back end
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
        return path

    def check_guest(self, guest: GuestChannel) -> None:
        accepted = guest.number(f"virtio-{KINDS[self._setup.kind].virtio_type:04x}", "features")
        missing = [
            name for name, bit in self._setup.required_features().items() if not accepted & bit
        ]
        if missing:
            raise UnsupportedError(
                f"the guest's driver uses the features {accepted:#x}, without "
                f"{' and '.join(missing)}: the back end or QEMU does not offer it; leave out "
                "--ring and --iommu, or use a back end with this feature"
            )

    def migrates_from(self, side: str) -> None:
        # A back end may end when it has handed its state over to the destination, as passt does.
        self._backends[side].allow_success()

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
