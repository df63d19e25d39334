"""vhost-scsi on a file: reads, a reset of the LUN, and events of a LUN that comes and goes.

The device writes data and responses in vhost_scsi_complete_cmd_work(), the response of a reset in
vhost_scsi_tmf_resp_work(), and events in vhost_scsi_do_evt_work() (drivers/vhost/scsi.c).

A read is in flight for as long as a proof wants if the file is a named pipe (`StallingDisk`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

from dmaproof.units import PAGE_BYTES

from ..outcome import NotSupportedError, Proof, require, require_defect
from .abi import SCSI_TARGET, Feature, Ioctl
from .device import VhostDevice, wait_until
from .memory import Comparison, GuestMemory, Region
from .net_proofs import require_cleared_bit_shows
from .ring import Buffer, Layout, Ring

PATH: Final = "/dev/vhost-scsi"
_CONTROL, _EVENT, _COMMAND = range(3)
_TARGETS: Final = Path("/sys/kernel/config/target")
_NAME: Final = "naa.6001405000000001"
_TPGT: Final = 1
_SECTOR_BYTES: Final = 512
_DISK_SECTORS: Final = 2048
_DISK_BYTES: Final = _DISK_SECTORS * _SECTOR_BYTES
_MOST_SECTORS: Final = 32
_COMMANDS: Final = 12
_REQUEST: Final = struct.Struct("<8sQBBB32s")
"""struct virtio_scsi_cmd_req (virtio 1.2, 5.6.6.1)."""
_RESPONSE_BYTES: Final = 108
_READ_10: Final = struct.Struct(">BBIBHB")
_READ_10_CODE: Final = 0x28
_TMF: Final = struct.Struct("<II8sQ")
"""struct virtio_scsi_ctrl_tmf (virtio 1.2, 5.6.6.2)."""
_LUN_RESET: Final = 5
_EVENT_BYTES: Final = 16
_SIZE: Final = 128
_REGIONS: Final = (Region(16, 32), Region(48, 96))
_PAGES_OF_RING: Final = 5
_FIRST_RING_PAGE: Final = 16
_TABLE_PAGE: Final = 34
_REQUEST_PAGE: Final = 44
_BUFFER_PAGE: Final = 48
_BUFFER_PAGES: Final = 96
_STALL_S: Final = 5.0
"""A request that takes so long waits for the reads: it has nothing else to do."""


class StallingDisk:
    """A named pipe that is the file of a target; its reads wait until `answer`."""

    def __init__(self, path: Path, choose: random.Random) -> None:
        """Make the pipe."""
        self._data = choose.randbytes(_COMMANDS * _MOST_SECTORS * _SECTOR_BYTES)
        os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, len(self._data))

    def answer(self) -> None:
        """Give the pipe the data of all reads at once."""
        os.write(self._pipe, self._data)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._pipe)


class Target:
    """A LIO target for vhost-scsi on a file, made through configfs."""

    def __init__(self, file: Path) -> None:
        """Make the target.

        Raises:
            NotSupportedError: the kernel has no vhost-scsi or no configfs.
        """
        self._stack = contextlib.ExitStack()
        try:
            store = self._folder(_TARGETS / "core/fileio_0/dmaproof")
        except OSError as error:
            raise NotSupportedError(str(error)) from None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            (store / "control").write_text(f"fd_dev_name={file},fd_dev_size={_DISK_BYTES}")
            (store / "enable").write_text("1")
            group = self._folder(_TARGETS / f"vhost/{_NAME}/tpgt_{_TPGT}")
            (group / "nexus").write_text(_NAME)
            self._stack.callback(self._drop_nexus, group)
            self._store = store
            self.luns = group / "lun"
            self.add(0)
            self._stack.callback(self.remove, 0)
            undo.pop_all()

    def _folder(self, path: Path) -> Path:
        """Make a folder and its missing parents, which are removed at the end."""
        if not path.parent.is_dir():
            self._folder(path.parent)
        if not path.is_dir():
            path.mkdir()
            self._stack.callback(path.rmdir)
        return path

    @staticmethod
    def _drop_nexus(group: Path) -> None:
        (group / "nexus").write_text("NULL")

    def add(self, lun: int) -> None:
        """Add a LUN; a running device reports that to the guest."""
        folder = self.luns / f"lun_{lun}"
        folder.mkdir()
        (folder / "disk").symlink_to(self._store)

    def remove(self, lun: int) -> None:
        """Remove a LUN."""
        folder = self.luns / f"lun_{lun}"
        (folder / "disk").unlink()
        folder.rmdir()

    def close(self) -> None:
        """Remove the target."""
        self._stack.close()


class ScsiDevice:
    """A vhost-scsi device with its three rings; it runs only in `run`."""

    def __init__(self, choose: random.Random, timeout_s: float, *, logs: bool = True) -> None:
        """Open the device; each used ring crosses a page border.

        If the device does not log from the beginning, `start_log` begins that, and `Ring.is_taken`
        works.
        """
        self.memory = GuestMemory(_REGIONS, choose)
        self._choose = choose
        self._timeout_s = timeout_s
        self._features = {Feature.INDIRECT, Feature.SCSI_HOTPLUG}
        if choose.random() < 0.5 or not logs:
            self._features.add(Feature.EVENT_INDEX)
        self.rings = []
        for index in range(_COMMAND + 1):
            page = _FIRST_RING_PAGE + index * _PAGES_OF_RING
            place = self.memory.bus
            used = place(page + 4) - 4 * choose.randrange(1, 50)
            layout = Layout(_SIZE, place(page), place(page + 2), used, place(_TABLE_PAGE))
            self.rings.append(Ring(self.memory, layout, choose.randrange(65536)))
        features = self._features | ({Feature.LOG_ALL} if logs else set())
        self._vhost = VhostDevice(PATH, self.memory, features)
        with contextlib.ExitStack() as undo:
            undo.callback(self._vhost.close)
            for index, ring in enumerate(self.rings):
                self._vhost.add_ring(index, ring)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._vhost.close()

    def start_log(self) -> None:
        """Let the running device log what it writes from now on."""
        self._vhost.set_features(self._features | {Feature.VERSION_1, Feature.LOG_ALL})

    def buffer(self, length: int, alignment: int = 1) -> Buffer:
        """Return a buffer anywhere."""
        places = (_BUFFER_PAGES * PAGE_BYTES - length) // alignment
        return Buffer(
            self.memory.bus(_BUFFER_PAGE) + self._choose.randrange(places) * alignment, length
        )

    def request(self, number: int, data: bytes) -> Buffer:
        """Return a buffer that the device reads."""
        place = self.memory.bus(_REQUEST_PAGE) + number * 64
        self.memory.write(place, data)
        return Buffer(place, len(data), writable=False)

    def run(self, begin: Callable[[], object], done: Callable[[], bool], what: str) -> Comparison:
        """Start the device, notify it, `begin`, wait until it is `done`, and stop it."""
        target = SCSI_TARGET.pack(1, _NAME.encode(), _TPGT, 0)
        self.memory.snapshot()
        self._vhost.request(Ioctl.SCSI_SET_ENDPOINT, target)
        try:
            for index in range(len(self.rings)):
                self._vhost.kick(index)
            begin()
            wait_until(done, what, self._timeout_s)
        finally:
            # This waits for all commands, whose pages are logged before.
            self._vhost.request(Ioctl.SCSI_CLEAR_ENDPOINT, target)
        for ring in self.rings:
            ring.reclaim()
        return self.memory.compare()

    def ring_pages(self) -> frozenset[int]:
        """Return the pages of the rings."""
        first = self.memory.bus(_FIRST_RING_PAGE)
        return self.memory.guest_pages(first, len(self.rings) * _PAGES_OF_RING * PAGE_BYTES)


def _lun(number: int) -> bytes:
    return bytes([1, _TPGT, 0x40, number, 0, 0, 0, 0])


def _reads(
    device: ScsiDevice,
    choose: random.Random,
    *,
    aligned: bool,
    begin: Callable[[], object] = lambda: None,
) -> Comparison:
    """Read sectors into buffers in several parts; their borders are anywhere unless `aligned`."""
    unit = _SECTOR_BYTES if aligned else 1
    for number in range(_COMMANDS):
        sectors = choose.randrange(2, _MOST_SECTORS)
        block = choose.randrange(_DISK_SECTORS - sectors)
        command = _READ_10.pack(_READ_10_CODE, 0, block, 0, sectors, 0)
        request = _REQUEST.pack(_lun(0), number, 0, 0, 0, command)
        cut = choose.randrange(1, sectors * _SECTOR_BYTES // unit) * unit
        parts = (cut, sectors * _SECTOR_BYTES - cut)
        chain = [
            device.request(number, request),
            device.buffer(_RESPONSE_BYTES),
            *(device.buffer(length, unit) for length in parts),
        ]
        device.rings[_COMMAND].add(chain, indirect=choose.random() < 0.5)
    used = device.rings[_COMMAND].used
    return device.run(begin, lambda: used() == _COMMANDS, "read all sectors")


def _reset(device: ScsiDevice) -> Comparison:
    """Reset the LUN."""
    request = device.request(_COMMANDS, _TMF.pack(0, _LUN_RESET, _lun(0), 0))
    device.rings[_CONTROL].add([request, device.buffer(1)])
    used = device.rings[_CONTROL].used
    return device.run(lambda: None, lambda: used() == 1, "answered the reset")


def _plug(device: ScsiDevice, target: Target) -> Comparison:
    """Add a LUN and remove it; the device writes an event of each."""
    for _ in range(2):
        device.rings[_EVENT].add([device.buffer(_EVENT_BYTES)])

    def plug() -> None:
        target.add(1)
        target.remove(1)

    used = device.rings[_EVENT].used
    return device.run(plug, lambda: used() == 2, "reported the LUN")


@contextlib.contextmanager
def _target(choose: random.Random) -> Iterator[Target]:
    with TemporaryDirectory() as folder:
        file = Path(folder, "disk")
        file.write_bytes(choose.randbytes(_DISK_BYTES))
        with contextlib.closing(Target(file)) as target:
            yield target


@contextlib.contextmanager
def _stalling_target(choose: random.Random) -> Iterator[StallingDisk]:
    with TemporaryDirectory() as folder:
        pipe = Path(folder, "disk")
        with (
            contextlib.closing(StallingDisk(pipe, choose)) as disk,
            contextlib.closing(Target(pipe)),
        ):
            yield disk


def all_is_logged(what: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Require the bit of each page that the device writes.

    Raises:
        NotSupportedError: the kernel logs no buffer of vhost-scsi, as Linux 6.1.
    """
    choose = random.Random(seed)
    with _target(choose) as target, ScsiDevice(choose, timeout_s) as device:
        found = {
            "aligned reads": partial(_reads, device, choose, aligned=True),
            "unaligned reads": partial(_reads, device, choose, aligned=False),
            "a reset": partial(_reset, device),
            "events": partial(_plug, device, target),
        }[what]()
        rings = device.ring_pages()
    buffers = found.changed - rings
    require(bool(buffers), "the device wrote no buffer")
    if found.lost == buffers:
        raise NotSupportedError(
            f"this kernel's vhost-scsi logs no buffer: all {len(buffers)} changed pages of "
            "buffers have no bit; those of the used rings have"
        )
    require(not found.lost, f"seed {seed}: {len(found.lost)} of {len(found.changed)} pages lost")
    require_cleared_bit_shows(found, choose)
    return (
        f"all {len(found.changed)} changed pages have their bit, {len(found.unchanged)} bits are "
        "of unchanged pages",
        {
            "pages": len(found.changed),
            "lost": 0,
            "unchanged": len(found.unchanged),
            "seed": seed,
        },
    )


def in_flight_is_lost(seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Require the loss of what reads write that are in flight when user space has the device log.

    A kernel is correct if it logs these pages, or if it waits for the reads before the log begins.

    Raises:
        NotSupportedError: the kernel logs no buffer of vhost-scsi.
    """
    all_is_logged("unaligned reads", seed, timeout_s)
    choose = random.Random(seed)
    with (
        _stalling_target(choose) as disk,
        ScsiDevice(choose, timeout_s, logs=False) as device,
        ThreadPoolExecutor(1) as thread,
    ):
        command = device.rings[_COMMAND]
        ended, waits = 0, False

        def start_log() -> None:
            nonlocal ended, waits
            try:
                wait_until(command.is_taken, "taken all reads", timeout_s)
                request = thread.submit(device.start_log)
                waits = bool(wait([request], _STALL_S).not_done)
                if not waits:
                    device.memory.copy()  # What changes from now on has to be logged.
            finally:
                disk.answer()  # Otherwise the device cannot be stopped.
            request.result()
            if waits:
                device.memory.copy()
                ended = command.used()

        found = _reads(device, choose, aligned=False, begin=start_log)
        rings = device.ring_pages()
    lost, written = found.lost - rings, found.changed - rings
    require(waits or bool(written), "the device wrote no buffer")
    how = "VHOST_SET_FEATURES waits for the reads" if waits else "all reads are logged"
    require_defect(bool(lost), not lost, how)
    return (
        f"{_COMMANDS - ended} of {_COMMANDS} reads ended after VHOST_F_LOG_ALL was set: of "
        f"{len(written)} pages that changed after that, {len(lost)} have no bit",
        {"in_flight": _COMMANDS - ended, "lost": len(lost), "changed": len(found.changed)},
    )


def scsi_proofs(seed: int, timeout_s: float) -> dict[str, Proof]:
    """Return the proofs with vhost-scsi by name."""
    found: dict[str, Proof] = {
        f"scsi: {what}": partial(all_is_logged, what, seed, timeout_s)
        for what in ("aligned reads", "unaligned reads", "a reset", "events")
    }
    found["scsi: reads in flight when the log begins are not logged"] = partial(
        in_flight_is_lost, seed, timeout_s
    )
    return found
