"""A vhost-user device whose DMA a simulated VFIO device does, with a simulated kernel."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest

from dmaproof.errors import MemoryAccessError
from dmaproof.iova_bitmap import IovaRange
from dmaproof.stamp import read_stamp
from dmaproof.vfio.iommufd import Ioas, Iommufd
from dmaproof.vfio.requests import Bits, bitmap_for
from dmaproof.vfio.trackers import KernelTracker
from dmaproof.vfio.vhost_session import StandIn
from qmp_tools.testbed.ring_driver import PAGE, WRITE, Buffer, RingDriver, guest_memory, ram_fd
from support.front_end import FrontEnd

RAM_BYTES = 64 * PAGE
LOG_BYTES = 64
RING, HEADER, STATUS, DATA = 8 * PAGE, 20 * PAGE, 21 * PAGE, 30 * PAGE
LOW = (0, RAM_BYTES // 2, 0)
HIGH = (RAM_BYTES // 2, RAM_BYTES // 2, RAM_BYTES // 2)


class SimulatedHardware(KernelTracker):
    """An I/O address space, a device that writes through it, and the kernel's dirty bits.

    As with type1, unmapping drops the dirty bits of the range.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mapped: dict[int, tuple[int, int]] = {}
        self.dirty: set[int] = set()
        self.writes = 0
        self.released = 0

    def map(self, iova: int, address: int, length: int) -> None:
        assert not any(
            iova < at + size and at < iova + length for at, (_, size) in self.mapped.items()
        )
        self.mapped[iova] = address, length

    def unmap(self, iova: int, length: int) -> None:
        assert self.mapped.pop(iova)[1] == length
        self.dirty -= set(range(iova // PAGE, (iova + length) // PAGE))

    def write(self, iova: int, data: memoryview) -> None:
        start, (address, length) = next(
            item for item in self.mapped.items() if item[0] <= iova < item[0] + item[1][1]
        )
        assert iova + len(data) <= start + length
        ctypes.memmove(address + iova - start, bytes(data), len(data))
        self.writes += 1
        self.dirty |= set(range(iova // PAGE, (iova + len(data) - 1) // PAGE + 1))

    def release(self) -> None:
        self.released += 1

    def _begin(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        self.dirty.clear()
        return page_size

    def _end(self) -> None:
        self.dirty.clear()

    def _read(self, query: IovaRange, page_size: int) -> Bits:
        bits = bitmap_for(query.length, page_size)
        first = query.iova // page_size
        for page in range(first, first + query.length // page_size):
            if page in self.dirty:
                bits[(page - first) // 64] |= np.uint64(1 << (page - first) % 64)
                self.dirty.discard(page)
        return bits


class Guest(NamedTuple):
    front_end: FrontEnd
    driver: RingDriver
    hardware: SimulatedHardware
    ram: int
    log: int


@pytest.fixture
def guest() -> Iterator[Guest]:
    hardware = SimulatedHardware()
    stand_in = StandIn(hardware, hardware, hardware.write, hardware.release)
    with ram_fd(RAM_BYTES) as ram, ram_fd(LOG_BYTES) as log:
        front_end = FrontEnd(stand_in=stand_in)
        driver = RingDriver(guest_memory(ram, LOW, HIGH), RING)
        front_end.set_memory(ram, LOW, HIGH)
        front_end.start_ring(driver)
        yield Guest(front_end, driver, hardware, ram, log)
        front_end.close()
    assert hardware.released == 1


def read(guest: Guest, target: int) -> bytes:
    """Make the disk read a page into `target`, and return the content of `target`."""
    guest.driver.write(HEADER, struct.pack("<IIQ", 0, 0, 80))
    chain = [Buffer(HEADER, 16), Buffer(target, PAGE, WRITE), Buffer(STATUS, 1, WRITE)]
    guest.driver.describe(guest.driver.chain(chain))
    guest.driver.publish(0)
    guest.front_end.serve()
    return guest.driver.read(target, PAGE)


def start_logging(guest: Guest) -> None:
    guest.front_end.set_log(guest.log, LOG_BYTES)
    guest.front_end.log_all(True)


def logged(guest: Guest) -> set[int]:
    bits = np.unpackbits(
        np.frombuffer(os.pread(guest.log, LOG_BYTES, 0), np.uint8), bitorder="little"
    )
    return set(np.flatnonzero(bits).tolist())


def test_the_hardware_writes_and_logs_all_data_of_the_disk(guest: Guest) -> None:
    start_logging(guest)
    assert read_stamp(read(guest, DATA)) == (80, 1)
    assert guest.hardware.writes >= 4, "data, status, used element, used index"
    used = (guest.driver.used) // PAGE
    assert guest.hardware.dirty == {DATA // PAGE, STATUS // PAGE, used}
    assert logged(guest) == set()
    guest.front_end.stop_ring()
    assert logged(guest) == {DATA // PAGE, STATUS // PAGE, used}
    records = guest.front_end.session.journal.records()
    assert set((records["gpa"] // PAGE).tolist()) == logged(guest)


def test_only_the_last_memory_table_is_mapped(guest: Guest) -> None:
    assert sorted(guest.hardware.mapped) == [LOW[0], HIGH[0]]
    guest.front_end.set_memory(guest.ram, LOW)
    assert sorted(guest.hardware.mapped) == [LOW[0]]
    with pytest.raises(MemoryAccessError, match="nothing is mapped"):
        guest.front_end.session.dma.write(HIGH[0], b"x")
    assert read_stamp(read(guest, DATA)) == (80, 1)


def test_a_new_memory_table_loses_no_dirty_page_of_the_old_one(
    guest: Guest,
) -> None:
    start_logging(guest)
    guest.front_end.session.dma.write(DATA, b"x")
    guest.front_end.set_memory(guest.ram, LOW, HIGH)
    guest.front_end.session.dma.write(HIGH[0], b"x")
    guest.front_end.stop_ring()
    assert logged(guest) == {DATA // PAGE, HIGH[0] // PAGE}


def test_the_hardware_is_released_when_the_front_end_disconnects(guest: Guest) -> None:
    start_logging(guest)
    read(guest, DATA)
    guest.front_end.session.close()
    assert guest.hardware.released == 1
    guest.hardware.released = 0  # the fixture closes the session again


def test_an_ioas_maps_through_its_iommufd(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(Iommufd, "alloc_ioas", lambda self: 7)
    monkeypatch.setattr(Iommufd, "map", lambda self, *numbers: calls.append(("map", *numbers)))
    monkeypatch.setattr(Iommufd, "unmap", lambda self, *numbers: calls.append(("unmap", *numbers)))
    with Iommufd("/dev/null") as iommufd:
        space = Ioas(iommufd)
        space.map(1 << 32, 0x1000, 2 * PAGE)
        space.unmap(1 << 32, 2 * PAGE)
    assert calls == [("map", 7, 1 << 32, 0x1000, 2 * PAGE), ("unmap", 7, 1 << 32, 2 * PAGE)]
