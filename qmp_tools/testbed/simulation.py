"""One scene of the test bed: a migration in which everything happens that can break a chain.

The guest has RAM below and above 4 GiB, in slots that are no whole words of the log. Part of its
bus addresses are not the guest-physical ones. After the first pass, which sends everything, each
data page is written by the device a single time, in runs of one to eight pages that need not begin
or end with a page; so any bit that is lost shows. Half-way, memory is plugged in and the log grows.
The last writes are made just before the rings are stopped.

Then RAM is compared and the loss attributed as after a real migration. The test bed knows more than
QEMU tells: which bits it has taken from the log. A bit that the chain has merged and that was never
taken was lost in the log.

With an IOMMU the guest maps each buffer for its request alone, some twice, and takes the mappings
away once that is done, now and then all at once: then the device has to ask for its ring, too. Of
some mappings it is told beforehand, for most it has to ask. The same IOVAs are used again and again
for other pages.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmaproof.devices.blk import T_IN
from dmaproof.dirty_log import log_bytes_needed
from dmaproof.errors import ProtocolError, UntestableError, WaitTimeoutError
from dmaproof.evidence import Evidence
from dmaproof.guest_memory import READ as READ_ACCESS
from dmaproof.guest_memory import WRITE as WRITE_ACCESS
from dmaproof.guest_memory import GuestMemory, IovaMap, IovaMapping
from dmaproof.trace import Link
from dmaproof.vhost_user.features import F_RING_PACKED, PROTOCOL_FEATURES
from dmaproof.vhost_user.messages import Request, encode_u64

from ..devices.process import DeviceOptions
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..memory.ram import RamFile, compare
from ..migration.judgement import Blame
from ..proof.attribution import LostPage, attribute
from ..proof.sensitivity import measure_sensitivity
from ..proof.verdict import GuestOutcome, Verdict
from .front_end import FEATURES, FrontEnd
from .guest_iommu import GuestIommu
from .hosted_device import HostedDevice, device_process, device_thread
from .precopy import PAGE_BYTES, Place, Precopy
from .ring_driver import WRITE, Buffer, PackedDriver, RingDriver, guest_memory, ram_fd

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
_POLL_S: Final = 0.0002
_PASS_EVERY_S: Final = 0.003
"""Far more often than with QEMU. If it were oftener still, nothing would ever stand in the log long
enough to be spoilt there."""

Run = tuple[int, int]
"""Bus address, or behind an IOMMU GPA, and length in bytes of one buffer."""
_EVERYTHING: Final = (0, 1 << 64)


def simulate(
    options: DeviceOptions,
    folder: Path,
    *,
    devices: int = 1,
    packed: bool = False,
    killed: bool = False,
    iommu: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Verdict:
    """Play the scene with a device, or with two that share the log; `folder` takes the evidence.

    Its rings are split ones or `packed`. Half-way the device may be `killed` and started again. It
    may be behind an `iommu`. Two devices, or one that is to be killed, are processes, and have a
    bus without surprises but for that. `timeout_s` bounds each wait for a device.

    Raises:
        UntestableError: a device refused something, died, or does not go on.
    """
    with contextlib.ExitStack() as stack:
        source, destination = (stack.enter_context(ram_fd(_RAM_BYTES)) for _ in range(2))
        precopy = Precopy(source, destination, (_LOW, _HIGH))
        guests = []

        def start_device() -> HostedDevice:
            if devices == 1 and not killed:
                return stack.enter_context(device_thread(options, _swapped_bus, timeout_s))
            state = folder if killed else None
            return stack.enter_context(device_process(options, state, timeout_s))

        for number in range(devices):
            chance = random.Random(options.seed + number)
            behind = GuestIommu() if iommu else None
            guests.append(_Guest(start_device(), precopy, source, number, packed, behind, chance))
            stack.callback(guests[-1].close)
        try:
            all_sent_ns = _migrate(
                guests,
                precopy,
                source,
                random.Random(options.seed),
                stack,
                start_device if killed else None,
            )
        except (OSError, ProtocolError) as error:
            for guest in guests:
                guest.device.events()  # perhaps it has told why it hung up
            raise UntestableError(f"the device of the test bed: {error}") from error
        evidence = [
            replace(guest.device.evidence(folder), device=f"device {number}")
            for number, guest in enumerate(guests)
        ]
        ram = [_ram_file(fd) for fd in (source, destination)]
        sensitivity = measure_sensitivity(evidence, all_sent_ns)
        lost = _attribute(ram[0], ram[1], evidence, precopy)
        done = sum(guest.requests for guest in guests)
        return Verdict(ram[0].pages, lost, sensitivity, GuestOutcome(done, 0, 0))


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
    start_another: Callable[[], HostedDevice] | None,
) -> int:
    """From the boot to the last pass; returns when every page had been sent once.

    If there is a way to `start_another` device, that of the first guest is killed.
    """
    for guest in guests:
        guest.boot(ram)
    _set_log(guests, precopy, stack)
    for guest in guests:
        guest.log_all()
    precopy.send_all()
    all_sent_ns = time.monotonic_ns()
    runs = _runs(_HIGH, chance, len(guests))
    half = len(runs) // 2
    _write(guests, runs[:half], precopy)
    if start_another is not None:
        guests[0].lose_device(runs[half], runs[half + 1], precopy, start_another)
    precopy.places += (_PLUGGED,)
    _set_log(guests, precopy, stack)
    for guest in guests:
        guest.front_end.set_memory(ram, *precopy.places)
        guest.settle()
    rest = runs[half + (2 if start_another else 0) :] + _runs(_PLUGGED, chance, len(guests))
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
        guest.set_log(log, size)
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
        next_pass_s = began_s = time.monotonic()
        while not all(guest.served() for guest in guests):
            now_s = time.monotonic()
            guests[0].require_time_since(began_s)
            if now_s >= next_pass_s:
                precopy.pass_on()
                next_pass_s = now_s + _PASS_EVERY_S
            time.sleep(_POLL_S)


class _SplitDriver(RingDriver):
    """A driver whose every write is a vCPU's."""

    precopy: Precopy

    def write(self, gpa: int, data: bytes) -> None:
        super().write(gpa, data)
        self.precopy.cpu_wrote(gpa, len(data))


class _PackedDriver(PackedDriver):
    """The same with a packed ring."""

    precopy: Precopy

    def write(self, gpa: int, data: bytes) -> None:
        super().write(gpa, data)
        self.precopy.cpu_wrote(gpa, len(data))


class _Guest:
    """What one device is attached to: QEMU's end of the socket, and the guest's driver."""

    def __init__(
        self,
        device: HostedDevice,
        precopy: Precopy,
        ram: int,
        number: int,
        packed: bool,
        iommu: GuestIommu | None,
        chance: random.Random,
    ) -> None:
        self.device = device
        features = FEATURES | (F_RING_PACKED if packed else 0)
        self.front_end = FrontEnd(device.peer, features, iommu, device.timeout_s)
        self.requests = 0
        self._served = 0
        self._hears = True
        """Whether there is a device to be told of anything."""
        self._iommu = iommu
        self._chance = chance
        self._mapped: dict[int, list[Run]] = {}
        """By the number of the request for which they were mapped: IOVAs and lengths."""
        self._done: list[Run] = []
        """What is mapped still, though its request is done."""
        self._base = (number + 1) * _DRIVER_PAGES * PAGE_BYTES
        make_driver = _PackedDriver if packed else _SplitDriver
        self._driver = make_driver(guest_memory(ram, _LOW), self._base, _RING_SIZE)
        self._driver.precopy = precopy

    def close(self) -> None:
        """Let go of everything."""
        self.front_end.close()

    def boot(self, ram: int) -> None:
        """The guest has loaded its driver."""
        self._ram = ram
        self.front_end.send(Request.SET_FEATURES, encode_u64(self.front_end.features))
        self.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        self.front_end.open_channel()
        self.front_end.track_inflight(1, _RING_SIZE)
        self.front_end.set_memory(ram, _LOW, _HIGH)
        self.front_end.start_ring(self._driver)
        self.settle()

    def set_log(self, log: int, size: int) -> None:
        """Hand over a dirty log of `size` bytes."""
        self._log = log, size
        self.front_end.set_log(log, size)

    def lose_device(
        self,
        before: Run,
        behind: Run,
        precopy: Precopy,
        start_another: Callable[[], HostedDevice],
    ) -> None:
        """Have a run written `before` the device is killed, and one `behind` that, by another.

        QEMU does what it does: it tells everything anew, and hands over what was in flight.
        """
        self.publish([[before]])
        precopy.pass_on()
        self.kick()
        self._wait_until_served()
        self.device.kill()
        precopy.pass_on()
        self._hears = False
        self.publish([[behind]])  # nobody takes that yet
        precopy.pass_on()
        self.device = start_another()
        self._hears = True
        self.front_end.socket = self.device.peer
        front_end = self.front_end
        front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        front_end.open_channel()
        front_end.log_all(True)
        front_end.track_inflight(1, _RING_SIZE)
        front_end.set_memory(self._ram, _LOW, _HIGH)
        base = self._driver.used_index if isinstance(self._driver, RingDriver) else None
        front_end.start_ring(self._driver, base=base, logged=True)
        front_end.set_log(*self._log)
        self.settle()
        self._wait_until_served()

    def _wait_until_served(self) -> None:
        began_s = time.monotonic()
        while not self.served():
            self.require_time_since(began_s)

    def require_time_since(self, began_s: float) -> None:
        """Give the device up if it has not served its ring since `began_s` (monotonic).

        Raises:
            WaitTimeoutError: the wait has reached its bound.
        """
        if time.monotonic() - began_s > self.device.timeout_s:
            raise WaitTimeoutError(
                f"the device of the test bed has not served its ring within "
                f"{self.device.timeout_s:g} s"
            )

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
        for number, runs in enumerate(filter(None, batch)):
            header = self._base + _HEADERS + 16 * number
            status = self._base + _STATUSES + self.requests % _STATUS_PAGES * PAGE_BYTES
            self._driver.write(header, struct.pack("<IIQ", T_IN, 0, 8 * self.requests))
            self._driver.write(status, b"\xff")
            buffers = [
                Buffer(header, 16),
                *(Buffer(address, length, WRITE) for address, length in runs),
                Buffer(status, 1, WRITE),
            ]
            mapped = self._map(buffers) if self._iommu else buffers
            request = self._driver.submit(mapped)
            self._mapped[request] = [(it.address, it.length) for it in mapped]
            self.requests += 1

    def _map(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """The same by IOVAs, each mapped for just what the device is to do."""
        assert self._iommu is not None
        mapped = []
        for buffer in buffers:
            access = WRITE_ACCESS if buffer.flags & WRITE else READ_ACCESS
            iova = self._iommu.map(buffer.address, buffer.length, access)
            mapped.append(replace(buffer, address=iova))
            if self._chance.random() < 0.25:
                self._done.append((self._iommu.map(buffer.address, buffer.length), buffer.length))
            if self._hears and self._chance.random() < 0.25:
                for page in self._iommu.pages(iova, buffer.length):
                    self.front_end.update(page)
        return mapped

    def _unmap(self) -> None:
        """Take away what is not needed any more, or of that only a part yet."""
        assert self._iommu is not None
        count = self._chance.randrange(len(self._done) + 1)
        self._chance.shuffle(self._done)
        gone, self._done = self._done[:count], self._done[count:]
        for run in gone:
            self._iommu.unmap(*run)
        if gone and self._chance.random() < 0.1:
            self.front_end.invalidate(*_EVERYTHING)
            return
        for iova, length in gone:
            self.front_end.invalidate(iova, length)

    def kick(self) -> None:
        """Tell the device that there are requests."""
        os.eventfd_write(self.front_end.kick, 1)

    def served(self) -> bool:
        """Whether every request has come back.

        Raises:
            UntestableError: the device is gone, or has refused something.
        """
        self.device.events()
        if self._iommu is not None:
            self.front_end.answer_misses()
        for request, _ in self._driver.collect():
            self._served += 1
            self._done += self._mapped.pop(request)
        if self._iommu is not None:
            self._unmap()
        return self._served == self.requests


# The verdict ------------------------------------------------------------------------------------


def _ram_file(fd: int) -> RamFile:
    status = os.fstat(fd)
    return RamFile(fd, status.st_size, status.st_dev, status.st_ino)


def _attribute(
    source: RamFile, destination: RamFile, evidence: Sequence[Evidence], precopy: Precopy
) -> list[LostPage]:
    """As after a real migration, but for bits that were lost in the log."""
    differing = compare(source, destination)
    lost = attribute(differing, source, destination, evidence[0].slots, evidence)
    started_ns = {each.device or None: each.started_ns or 0 for each in evidence}
    return [_known_better(page, started_ns.get(page.device, 0), precopy) for page in lost]


def _known_better(page: LostPage, started_ns: int, precopy: Precopy) -> LostPage:
    if page.link != Link.QEMU or page.seconds is None:
        return page
    written_ns = started_ns + round(page.seconds * 1e9)
    if int(precopy.logged_ns[page.ram_offset // PAGE_BYTES]) >= written_ns:
        return page
    return replace(page, blame=Blame.DEVICE, link=Link.LOG)
