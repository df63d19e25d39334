"""A simulated migration that exercises everything that can break a chain.

The guest has RAM below and above 4 GiB, in slots that do not cover whole words of the log. Some of
its bus addresses differ from the guest-physical ones. After the first pass, which sends every page,
the device writes each data page exactly once, in runs of one to eight pages that need not begin or
end at a page boundary. Any lost bit is therefore detected. Half-way, memory is plugged in and the
log grows. The last writes come just before the rings are stopped.

Then the RAM is compared and losses are attributed as after a real migration. The test bed knows
which bits it has taken from the log, which QEMU does not report. A bit that the chain has merged
and that was never taken from the log was lost in the log.

With an IOMMU, the guest maps each buffer for one request only, and some buffers twice. It removes
the mappings when the request is done, sometimes all at once; the device then has to request the
mapping of its ring, too. The device receives some mappings in advance, and has to request most of
them. The same IOVAs are used repeatedly for different pages.
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
from ..proof.rings import Ring
from ..proof.sensitivity import measure_sensitivity
from ..proof.verdict import GuestOutcome, Verdict
from ..qemu.machine import SOURCE
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
"""On the bus, this much of the high slot, from its start on, is swapped with as much after it."""

_RING_SIZE: Final = 64
_DRIVER_PAGES: Final = 64
"""Pages of the low slot for each device: its ring, then headers, then status bytes, one a page."""
_HEADERS, _STATUSES, _STATUS_PAGES = 2 * PAGE_BYTES, 8 * PAGE_BYTES, 32
_BATCH: Final = 4
_POLL_S: Final = 0.0002
_PASS_EVERY_S: Final = 0.003
"""Passes are far more frequent than with QEMU. If they were even more frequent, no bit would stay
in the log long enough for a fault to damage it there."""

Run = tuple[int, int]
"""The bus address (behind an IOMMU, the GPA) and the length in bytes of one buffer."""
_EVERYTHING: Final = (0, 1 << 64)


def simulate(
    options: DeviceOptions,
    folder: Path,
    *,
    devices: int = 1,
    packed: bool = False,
    killed: bool = False,
    reset: bool = False,
    iommu: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Verdict:
    """Simulate a migration with one device, or with two that share the log.

    Two devices, or one that is to be killed, run as processes. Without an `iommu`, their bus
    addresses are then the guest-physical ones.

    Args:
        options: tracker, harvest policy, fault and seed of the device.
        folder: where the devices write their evidence.
        devices: 1 or 2.
        packed: whether the rings are packed instead of split.
        killed: whether the device is killed half-way and started again.
        reset: whether the guest resets the device half-way.
        iommu: whether the device is behind an IOMMU.
        timeout_s: bounds each wait for a device, in seconds.

    Raises:
        UntestableError: a device refused something, died, or makes no progress.
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
            guest_iommu = GuestIommu() if iommu else None
            guests.append(
                _Guest(start_device(), precopy, source, number, packed, guest_iommu, chance)
            )
            stack.callback(guests[-1].close)
        try:
            all_sent_ns = _migrate(
                guests,
                precopy,
                source,
                random.Random(options.seed),
                stack,
                start_device if killed else None,
                reset=reset,
            )
        except (OSError, ProtocolError) as error:
            for guest in guests:
                guest.device.events()  # raises if the device reported why it closed the connection
            raise UntestableError(
                f"the device of the test bed did not carry out a step: {error}"
            ) from error
        evidence = [
            replace(guest.device.evidence(folder), device=f"device {number}")
            for number, guest in enumerate(guests)
        ]
        ram = [_ram_file(fd) for fd in (source, destination)]
        sensitivity = measure_sensitivity(evidence, all_sent_ns)
        lost = _attribute(ram[0], ram[1], evidence, precopy)
        done = sum(guest.requests for guest in guests)
        rings = [ring for guest in guests for ring in guest.wrong_rings]
        outcome = GuestOutcome(done, 0, 0)
        return Verdict(ram[0].pages, lost, sensitivity, outcome, wrong_rings=rings)


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


# The steps --------------------------------------------------------------------------------------


def _migrate(
    guests: Sequence[_Guest],
    precopy: Precopy,
    ram: int,
    chance: random.Random,
    stack: contextlib.ExitStack,
    start_another: Callable[[], HostedDevice] | None,
    *,
    reset: bool,
) -> int:
    """Run from the boot to the last pass; return the time at which every page had been sent once.

    With `start_another`, the device of the first guest is killed and another one started. With
    `reset`, the guests reset their devices.
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
    if reset:
        for guest in guests:
            guest.stop()
        precopy.pass_on()
        for guest in guests:
            guest.start_again()
        precopy.pass_on()
        _set_log(guests, precopy, stack)
    precopy.places += (_PLUGGED,)
    _set_log(guests, precopy, stack)
    for guest in guests:
        guest.front_end.set_memory(ram, *precopy.places)
        guest.settle()
    rest = runs[half + (2 if start_another else 0) :] + _runs(_PLUGGED, chance, len(guests))
    chance.shuffle(rest)
    _write(guests, rest, precopy)
    for guest in guests:
        guest.stop()
    precopy.pass_on()
    return all_sent_ns


def _set_log(guests: Sequence[_Guest], precopy: Precopy, stack: contextlib.ExitStack) -> None:
    """Set a log that covers all places; like QEMU, sync it only after SET_LOG_BASE is answered."""
    size = log_bytes_needed(max(place.gpa + place.length for place in precopy.places))
    log = stack.enter_context(ram_fd(size))
    for guest in guests:
        guest.set_log(log, size)
    precopy.set_log(log)


def _runs(place: Place, chance: random.Random, devices: int) -> list[Run]:
    """Return runs that contain every page of `place` once; single pages for several devices."""
    runs = []
    page, pages = 0, place.length // PAGE_BYTES
    while page < pages:
        count = min(chance.randint(1, 8) if devices == 1 else 1, pages - page)
        iova, length = place.gpa + page * PAGE_BYTES, count * PAGE_BYTES
        if chance.random() < 0.25:
            before, after = 512 * chance.randrange(4), 512 * chance.randrange(4)
            iova, length = iova + before, length - before - after
        runs.append((iova, length))
        page += count
    chance.shuffle(runs)
    return runs


def _write(guests: Sequence[_Guest], runs: Sequence[Run], precopy: Precopy) -> None:
    """Let the devices write the runs; the page number determines the device."""
    shares = [
        [run for run in runs if run[0] // PAGE_BYTES % len(guests) == number]
        for number in range(len(guests))
    ]
    while any(shares):
        for guest, share in zip(guests, shares, strict=True):
            guest.publish([share[start : start + 3] for start in range(0, 3 * _BATCH, 3)])
            del share[: 3 * _BATCH]
        precopy.pass_on()  # sends the driver's own writes, so that they do not hide the device's
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
    """A driver with a split ring whose writes count as those of a vCPU."""

    precopy: Precopy

    def write(self, gpa: int, data: bytes) -> None:
        super().write(gpa, data)
        self.precopy.cpu_wrote(gpa, len(data))


class _PackedDriver(PackedDriver):
    """A driver with a packed ring whose writes count as those of a vCPU."""

    precopy: Precopy

    def write(self, gpa: int, data: bytes) -> None:
        super().write(gpa, data)
        self.precopy.cpu_wrote(gpa, len(data))


class _Guest:
    """The other side of one device: QEMU's end of the socket, and the guest's driver."""

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
        self._has_device = True
        """Whether a device is running that can receive messages."""
        self._iommu = iommu
        self._chance = chance
        self._mapped: dict[int, list[Run]] = {}
        """The IOVAs and lengths of the mappings, by the number of their request."""
        self._done: list[Run] = []
        """The remaining mappings of requests that are done."""
        self._base = (number + 1) * _DRIVER_PAGES * PAGE_BYTES
        make_driver = _PackedDriver if packed else _SplitDriver

        def load_driver() -> _SplitDriver | _PackedDriver:
            driver = make_driver(guest_memory(ram, _LOW), self._base, _RING_SIZE)
            driver.precopy = precopy
            return driver

        self._load_driver = load_driver
        self._driver = load_driver()
        self.wrong_rings: list[Ring] = []

    def close(self) -> None:
        """Release everything."""
        self.front_end.close()

    def boot(self, ram: int) -> None:
        """Send the messages that QEMU sends when the guest has loaded its driver."""
        self._ram = ram
        self.front_end.send(Request.SET_FEATURES, encode_u64(self.front_end.features))
        self.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        self.front_end.open_channel()
        self.front_end.track_inflight(1, _RING_SIZE)
        self.front_end.set_memory(ram, _LOW, _HIGH)
        self.front_end.start_ring(self._driver)
        self.settle()

    def set_log(self, log: int, size: int) -> None:
        """Send a dirty log of `size` bytes to the device."""
        self._log = log, size
        self.front_end.set_log(log, size)

    def stop(self) -> None:
        """Stop the ring, and check the device's answer as `proof.rings` does."""
        answered = self.front_end.stop_ring()
        if isinstance(self._driver, RingDriver):
            used, available = self._driver.used_index, self._driver.available_index
            ring = Ring(SOURCE, "the test bed", 0, _RING_SIZE, answered, used, available)
            self.wrong_rings += [] if ring.is_answered_right else [ring]

    def start_again(self) -> None:
        """Start the ring again, with the messages that QEMU sends after a reset, but the log."""
        self._driver.write(
            self._base, bytes(self._driver.used + self._driver.used_bytes - self._base)
        )
        self._driver = self._load_driver()
        self._served = self.requests
        self.front_end.log_all(True)
        self.front_end.set_memory(self._ram, _LOW, _HIGH)
        self.front_end.start_ring(self._driver, logged=True)
        self.settle()

    def lose_device(
        self,
        before: Run,
        after: Run,
        precopy: Precopy,
        start_another: Callable[[], HostedDevice],
    ) -> None:
        """Let the device write a run `before` it is killed, and another device one `after` that.

        As QEMU does, send the whole set-up again, including the in-flight requests.
        """
        self.publish([[before]])
        precopy.pass_on()
        self.kick()
        self._wait_until_served()
        self.device.kill()
        precopy.pass_on()
        self._has_device = False
        self.publish([[after]])  # no device is running that could take this request
        precopy.pass_on()
        self.device = start_another()
        self._has_device = True
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
        """Give up if the device has not served its ring since `began_s` (CLOCK_MONOTONIC).

        Raises:
            WaitTimeoutError: the wait has reached its bound.
        """
        if time.monotonic() - began_s > self.device.timeout_s:
            raise WaitTimeoutError(
                f"the device of the test bed has not served its ring within "
                f"{self.device.timeout_s:g} s; try again when the host is less busy"
            )

    def settle(self) -> None:
        """Wait until the device has carried out all messages."""
        self.front_end.ask(Request.GET_FEATURES)

    def log_all(self) -> None:
        """Switch dirty logging on."""
        self.front_end.log_all(True)
        self.front_end.set_ring_address(self._driver, logged=True)
        self.settle()

    def publish(self, batch: Sequence[Sequence[Run]]) -> None:
        """Make one read request for each list of buffers that is not empty."""
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
            self._mapped[request] = [(buffer.address, buffer.length) for buffer in mapped]
            self.requests += 1

    def _map(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Return the buffers with IOVAs, each mapped only for the access that the device needs."""
        assert self._iommu is not None
        mapped = []
        for buffer in buffers:
            access = WRITE_ACCESS if buffer.flags & WRITE else READ_ACCESS
            iova = self._iommu.map(buffer.address, buffer.length, access)
            mapped.append(replace(buffer, address=iova))
            if self._chance.random() < 0.25:
                self._done.append((self._iommu.map(buffer.address, buffer.length), buffer.length))
            if self._has_device and self._chance.random() < 0.25:
                for page in self._iommu.pages(iova, buffer.length):
                    self.front_end.update(page)
        return mapped

    def _unmap(self) -> None:
        """Remove a random part of the mappings that are no longer needed."""
        assert self._iommu is not None
        count = self._chance.randrange(len(self._done) + 1)
        self._chance.shuffle(self._done)
        removed, self._done = self._done[:count], self._done[count:]
        for run in removed:
            self._iommu.unmap(*run)
        if removed and self._chance.random() < 0.1:
            self.front_end.invalidate(*_EVERYTHING)
            return
        for iova, length in removed:
            self.front_end.invalidate(iova, length)

    def kick(self) -> None:
        """Notify the device of new requests."""
        os.eventfd_write(self.front_end.kick, 1)

    def served(self) -> bool:
        """Return whether every request has been completed.

        Raises:
            UntestableError: the device has ended, or has refused something.
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
    """Attribute losses as after a real migration, and also those of bits lost in the log."""
    differing = compare(source, destination)
    lost = attribute(differing, source, destination, evidence[0].slots, evidence)
    started_ns = {each.device or None: each.started_ns or 0 for each in evidence}
    return [_attribute_to_log(page, started_ns.get(page.device, 0), precopy) for page in lost]


def _attribute_to_log(page: LostPage, started_ns: int, precopy: Precopy) -> LostPage:
    """Blame the log if the last write's bit was merged into it, but was never taken from it."""
    if page.link != Link.QEMU or page.seconds is None:
        return page
    written_ns = started_ns + round(page.seconds * 1e9)
    if int(precopy.logged_ns[page.ram_offset // PAGE_BYTES]) >= written_ns:
        return page
    return replace(page, blame=Blame.DEVICE, link=Link.LOG)
