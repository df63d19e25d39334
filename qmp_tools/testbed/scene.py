"""One scene of the test bed: a migration in which everything happens that can break a chain.

The guest has RAM below and above 4 GiB, in slots that are no whole words of the log. Part of its
bus addresses are not the guest-physical ones. After the first pass, which sends everything, each
data page is written by the device a single time, in runs of one to eight pages that need not begin
or end with a page; so any bit that is lost shows. Half-way, memory is plugged in and the log grows.
The last writes are made just before the rings are stopped.

Then RAM is compared and the loss attributed as after a real migration. The test bed knows more than
QEMU tells: which bits it has taken from the log. A bit that the chain has merged and that was never
taken was lost in the log.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmaproof.devices.blk import T_IN
from dmaproof.dirty_log import log_bytes_needed
from dmaproof.errors import ProtocolError, UntestableError
from dmaproof.evidence import Evidence
from dmaproof.guest_memory import GuestMemory, IovaMap, IovaMapping
from dmaproof.trace import Link
from dmaproof.vhost_user.messages import Request, encode_u64
from dmaproof.vhost_user.session import PROTOCOL_FEATURES

from ..processes.device import DeviceOptions
from ..ram import RamFile, compare
from ..verdict import (
    Blame,
    GuestOutcome,
    LostPage,
    Sharpness,
    Verdict,
    attribute,
    measure_sharpness,
)
from .front_end import FEATURES, FrontEnd
from .hosted_device import HostedDevice, device_process, device_thread
from .precopy import PAGE_BYTES, Place, Precopy
from .ring_driver import NEXT, WRITE, Buffer, RingDriver, guest_memory, ram_fd

_LOW: Final = Place(0, 512 * PAGE_BYTES, 0)
_HIGH: Final = Place(4 << 30, 1061 * PAGE_BYTES, _LOW.length)
_PLUGGED: Final = Place(5 << 30, 77 * PAGE_BYTES, _LOW.length + _HIGH.length)
_RAM_BYTES: Final = _PLUGGED.offset + _PLUGGED.length
_SWAPPED_BYTES: Final = 512 * PAGE_BYTES
"""So much of the high slot from its start on changes places, on the bus, with so much behind it."""

_RING_SIZE: Final = 64
_DRIVER_PAGES: Final = 64
"""Of the low slot, for each device: its ring, then headers, then status bytes, a page for each."""
_HEADERS, _STATUSES, _STATUS_PAGES = 2 * PAGE_BYTES, 8 * PAGE_BYTES, 32
_BATCH: Final = 4
_PATIENCE_S: Final = 30.0
_POLL_S: Final = 0.0002
_PASS_EVERY_S: Final = 0.003
"""Far more often than with QEMU. If it were oftener still, nothing would ever stand in the log long
enough to be spoilt there."""

Run = tuple[int, int]
"""IOVA and length in bytes of one buffer."""


def play(options: DeviceOptions, folder: Path, *, devices: int = 1) -> Verdict:
    """Play the scene with a device, or with two that share the log; `folder` takes the evidence.

    Two devices are processes, and have a bus without surprises.

    Raises:
        UntestableError: a device refused something, died, or does not go on.
    """
    with contextlib.ExitStack() as stack:
        source, destination = (stack.enter_context(ram_fd(_RAM_BYTES)) for _ in range(2))
        precopy = Precopy(source, destination, (_LOW, _HIGH))
        guests = []
        for number in range(devices):
            host = device_thread(options, _swapped_bus) if devices == 1 else device_process(options)
            device = stack.enter_context(host)
            guests.append(_Guest(device, precopy, source, number))
            stack.callback(guests[-1].front_end.close)
        try:
            all_sent_ns = _migrate(guests, precopy, source, random.Random(options.seed), stack)
        except (OSError, ProtocolError) as error:
            for guest in guests:
                guest.device.events()  # perhaps it has told why it hung up
            raise UntestableError(f"the device of the test bed: {error}") from error
        evidence = [guest.device.evidence(folder) for guest in guests]
        ram = [_ram_file(fd) for fd in (source, destination)]
        sharpness = _sum([measure_sharpness(each, all_sent_ns) for each in evidence])
        lost = _attribute(ram[0], ram[1], evidence, precopy)
        done = sum(guest.requests for guest in guests)
        return Verdict(ram[0].pages, lost, sharpness, GuestOutcome(done, 0, 0))


def _swapped_bus(memory: GuestMemory) -> IovaMap:
    mappings = []
    for slot in memory.slots:
        if slot.gpa != _HIGH.gpa:
            mappings.append(IovaMapping(slot.gpa, slot.gpa, slot.length))
            continue
        first, second = slot.gpa, slot.gpa + _SWAPPED_BYTES
        rest = second + _SWAPPED_BYTES
        mappings.append(IovaMapping(first, second, _SWAPPED_BYTES))
        mappings.append(IovaMapping(second, first, _SWAPPED_BYTES))
        mappings.append(IovaMapping(rest, rest, slot.end - rest))
    return IovaMap(mappings)


# The story --------------------------------------------------------------------------------------


def _migrate(
    guests: Sequence[_Guest],
    precopy: Precopy,
    ram: int,
    chance: random.Random,
    stack: contextlib.ExitStack,
) -> int:
    """From the boot to the last pass; returns when every page had been sent once."""
    for guest in guests:
        guest.boot(ram)
    _set_log(guests, precopy, stack)
    for guest in guests:
        guest.log_all()
    precopy.send_all()
    all_sent_ns = time.monotonic_ns()
    runs = _runs(_HIGH, chance, len(guests))
    _write(guests, runs[: len(runs) // 2], precopy)
    precopy.places += (_PLUGGED,)
    _set_log(guests, precopy, stack)
    for guest in guests:
        guest.front_end.set_memory(ram, *precopy.places)
        guest.settle()
    rest = runs[len(runs) // 2 :] + _runs(_PLUGGED, chance, len(guests))
    chance.shuffle(rest)
    _write(guests, rest, precopy)
    for guest in guests:
        guest.front_end.stop_ring()
    precopy.pass_on()
    return all_sent_ns


def _set_log(guests: Sequence[_Guest], precopy: Precopy, stack: contextlib.ExitStack) -> None:
    """A log, or a larger one, that covers all places: SET_LOG_BASE is answered, then QEMU syncs."""
    size = log_bytes_needed(max(place.gpa + place.length for place in precopy.places))
    log = stack.enter_context(ram_fd(size))
    for guest in guests:
        guest.front_end.set_log(log, size)
    precopy.set_log(log)


def _runs(place: Place, chance: random.Random, devices: int) -> list[Run]:
    """Every page of `place` in just one run; with several devices runs are single pages."""
    runs = []
    page, pages = 0, place.length // PAGE_BYTES
    while page < pages:
        count = min(chance.randint(1, 8) if devices == 1 else 1, pages - page)
        iova, length = place.gpa + page * PAGE_BYTES, count * PAGE_BYTES
        if chance.random() < 0.25:
            before, behind = 512 * chance.randrange(4), 512 * chance.randrange(4)
            iova, length = iova + before, length - before - behind
        runs.append((iova, length))
        page += count
    chance.shuffle(runs)
    return runs


def _write(guests: Sequence[_Guest], runs: Sequence[Run], precopy: Precopy) -> None:
    """The devices write the runs; the one that writes a page follows from its number."""
    shares = [
        [run for run in runs if run[0] // PAGE_BYTES % len(guests) == number]
        for number in range(len(guests))
    ]
    while any(shares):
        for guest, share in zip(guests, shares, strict=True):
            guest.publish([share[start : start + 3] for start in range(0, 3 * _BATCH, 3)])
            del share[: 3 * _BATCH]
        precopy.pass_on()  # the driver's own writes are sent, so that they do not hide the device's
        for guest in guests:
            guest.kick()
        deadline_s = time.monotonic() + _PATIENCE_S
        next_pass_s = time.monotonic()
        while not all(guest.served() for guest in guests):
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise UntestableError("the device of the test bed does not serve its ring")
            if now_s >= next_pass_s:
                precopy.pass_on()
                next_pass_s = now_s + _PASS_EVERY_S
            time.sleep(_POLL_S)


class _Driver(RingDriver):
    """A driver whose every write is a vCPU's."""

    precopy: Precopy

    def write(self, gpa: int, data: bytes) -> None:
        super().write(gpa, data)
        self.precopy.cpu_wrote(gpa, len(data))


class _Guest:
    """What one device is attached to: QEMU's end of the socket, and the guest's driver."""

    def __init__(self, device: HostedDevice, precopy: Precopy, ram: int, number: int) -> None:
        self.device = device
        self.front_end = FrontEnd(device.peer)
        self.requests = 0
        self._base = (number + 1) * _DRIVER_PAGES * PAGE_BYTES
        self._driver = _Driver(guest_memory(ram, _LOW), self._base, _RING_SIZE)
        self._driver.precopy = precopy

    def boot(self, ram: int) -> None:
        """The guest has loaded its driver."""
        self.front_end.send(Request.SET_FEATURES, encode_u64(FEATURES))
        self.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        self.front_end.set_memory(ram, _LOW, _HIGH)
        self.front_end.start_ring(self._driver)
        self.settle()

    def settle(self) -> None:
        """Return when everything that was sent has been done."""
        self.front_end.ask(Request.GET_FEATURES)

    def log_all(self) -> None:
        """Switch dirty logging on."""
        self.front_end.log_all(True)
        self.front_end.set_ring_address(self._driver, logged=True)
        self.settle()

    def publish(self, batch: Sequence[Sequence[Run]]) -> None:
        """Make one read request for each of the lists of buffers, as far as they are not empty."""
        heads: list[int] = []
        index = 0
        for runs in filter(None, batch):
            header = self._base + _HEADERS + 16 * len(heads)
            status = self._base + _STATUSES + self.requests % _STATUS_PAGES * PAGE_BYTES
            self._driver.write(header, struct.pack("<IIQ", T_IN, 0, 8 * self.requests))
            self._driver.write(status, b"\xff")
            buffers = [
                Buffer(header, 16, NEXT, index + 1),
                *(
                    Buffer(iova, length, NEXT | WRITE, index + 2 + position)
                    for position, (iova, length) in enumerate(runs)
                ),
                Buffer(status, 1, WRITE),
            ]
            for position, buffer in enumerate(buffers, index):
                self._driver.write(self._driver.descriptors + 16 * position, buffer.pack())
            heads.append(index)
            index += len(buffers)
            self.requests += 1
        self._driver.publish(*heads)

    def kick(self) -> None:
        """Tell the device that there are requests."""
        os.eventfd_write(self.front_end.kick, 1)

    def served(self) -> bool:
        """Whether every request has come back.

        Raises:
            UntestableError: the device is gone, or has refused something.
        """
        self.device.events()
        return self._driver.used_index == self.requests & 0xFFFF


# The verdict ------------------------------------------------------------------------------------


def _ram_file(fd: int) -> RamFile:
    status = os.fstat(fd)
    return RamFile(fd, status.st_size, status.st_dev, status.st_ino)


def _sum(parts: Sequence[Sharpness]) -> Sharpness:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _attribute(
    source: RamFile, destination: RamFile, evidence: Sequence[Evidence], precopy: Precopy
) -> list[LostPage]:
    """As after a real migration, but for bits that were lost in the log."""
    differing = compare(source, destination)
    told = [
        [
            _known_better(page, each, precopy)
            for page in attribute(differing, source, destination, each.slots, each)
        ]
        for each in evidence
    ]
    # Each page was written by one of the devices; the others' journals do not know it.
    return [max(pages, key=lambda page: page.link is not None) for pages in zip(*told, strict=True)]


def _known_better(page: LostPage, evidence: Evidence, precopy: Precopy) -> LostPage:
    if page.link != Link.QEMU or page.seconds is None:
        return page
    written_ns = (evidence.started_ns or 0) + round(page.seconds * 1e9)
    if int(precopy.logged_ns[page.ram_offset // PAGE_BYTES]) >= written_ns:
        return page
    return replace(page, blame=Blame.DEVICE, link=Link.LOG)
