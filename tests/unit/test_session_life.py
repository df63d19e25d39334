"""What a session keeps and lets go of, as rings and logs come and go."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmaproof.stamp import read_stamp
from dmaproof.trace import TRACED_LINKS, Link
from dmaproof.vhost_user.features import PROTOCOL_FEATURES
from dmaproof.vhost_user.messages import Request, encode_u64
from dmaproof.virtqueue import SplitVirtqueue
from qmp_tools.testbed.ring_driver import (
    PAGE,
    WRITE,
    Buffer,
    RingDriver,
    guest_memory,
    ram_fd,
)
from support.front_end import FEATURES, FrontEnd

RAM_BYTES = 32 * PAGE
LOG_BYTES = 8
RING, HEADER, STATUS, DATA = 2 * PAGE, 6 * PAGE, 7 * PAGE, 24 * PAGE
DONE, UNTOUCHED = 0, 0xFF
PROTOCOL_FEATURES_BIT = 1 << 30


class Guest:
    """A front end, the driver of its first ring, and the files of its RAM and log."""

    def __init__(self, ram: int, log: int, features: int = FEATURES) -> None:
        self.front_end = FrontEnd()
        self.log = log
        self.front_end.send(Request.SET_FEATURES, encode_u64(features))
        self.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        self.front_end.set_memory(ram, (0, RAM_BYTES, 0))
        self.driver = RingDriver(guest_memory(ram, (0, RAM_BYTES, 0)), RING)

    def request(self, flags: int = 0) -> int:
        """Read a page from the disk; the status byte."""
        driver = self.driver
        driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
        driver.write(STATUS, bytes((UNTOUCHED,)))
        buffers = [Buffer(HEADER, 16), Buffer(DATA, PAGE, WRITE), Buffer(STATUS, 1, WRITE)]
        driver.describe(driver.chain(buffers))
        driver.publish(0, flags=flags)
        self.front_end.serve()
        return driver.read(STATUS, 1)[0]

    def start_logging(self) -> None:
        self.front_end.set_log(self.log, LOG_BYTES)
        self.front_end.log_all(True)


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    with ram_fd(RAM_BYTES) as ram, ram_fd(LOG_BYTES) as log:
        yield ram, log


@pytest.fixture
def guest(files: tuple[int, int]) -> Iterator[Guest]:
    guest = Guest(*files)
    guest.front_end.start_ring(guest.driver)
    os.eventfd_read(guest.front_end.call)  # sent in case a back end has died before
    yield guest
    guest.front_end.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:guest-ram")


def test_a_ring_that_is_switched_off_waits(guest: Guest) -> None:
    enable = struct.pack("<II", 0, 0), struct.pack("<II", 0, 1)
    guest.front_end.send(Request.SET_VRING_ENABLE, enable[0])
    assert guest.request() == UNTOUCHED
    guest.front_end.send(Request.SET_VRING_ENABLE, enable[1])
    guest.front_end.serve()
    assert guest.driver.read(STATUS, 1)[0] == DONE


def test_a_reset_switches_rings_off(guest: Guest) -> None:
    guest.front_end.send(Request.RESET_DEVICE)
    guest.front_end.send(Request.SET_VRING_KICK, encode_u64(0), [guest.front_end.kick])
    assert guest.request() == UNTOUCHED
    guest.front_end.send(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1))
    guest.front_end.serve()
    assert guest.driver.read(STATUS, 1)[0] == DONE


def test_without_protocol_features_rings_need_no_enabling(files: tuple[int, int]) -> None:
    guest = Guest(*files, features=FEATURES & ~PROTOCOL_FEATURES_BIT)
    front_end = guest.front_end
    front_end.send(Request.SET_VRING_NUM, struct.pack("<II", 0, guest.driver.size))
    front_end.set_ring_address(guest.driver)
    front_end.send(Request.SET_VRING_KICK, encode_u64(0), [front_end.kick])
    assert guest.request() == DONE
    front_end.close()


def test_a_driver_that_wants_no_interrupt_gets_none(guest: Guest) -> None:
    assert guest.request(flags=1) == DONE
    with pytest.raises(BlockingIOError):
        os.eventfd_read(guest.front_end.call)
    assert guest.request() == DONE
    assert os.eventfd_read(guest.front_end.call) == 1


def test_a_ring_that_filled_up_meanwhile_is_served_again(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = guest.front_end.session
    monkeypatch.setattr(SplitVirtqueue, "ask_for_kick", lambda queue: True)
    os.eventfd_write(guest.front_end.kick, 1)
    for key, _ in guest.front_end.selector.select(0):
        key.data()
    assert session.serve_rings()
    monkeypatch.undo()
    assert not session.serve_rings()


def test_new_events_take_the_old_ones_place(guest: Guest) -> None:
    before = open_files()
    for _ in range(5):
        guest.front_end.send(Request.SET_VRING_KICK, encode_u64(0), [guest.front_end.kick])
        guest.front_end.send(Request.SET_VRING_CALL, encode_u64(0), [guest.front_end.call])
    assert open_files() == before
    assert guest.request() == DONE


def test_every_file_that_comes_along_is_closed(guest: Guest) -> None:
    before = open_files()
    for request in (Request.SET_LOG_FD, Request.SET_VRING_ERR, Request.SET_OWNER):
        guest.front_end.send(request, encode_u64(0), [guest.log])
    assert open_files() == before


def test_a_log_that_is_replaced_before_it_is_used_is_released(guest: Guest) -> None:
    before = mappings()
    for _ in range(3):
        guest.front_end.set_log(guest.log, LOG_BYTES)
    assert mappings() == before + 1
    guest.front_end.log_all(True)
    guest.front_end.log_all(False)
    assert mappings() == before


def test_the_journal_ends_with_logging(guest: Guest) -> None:
    journal = guest.front_end.session.journal
    guest.request()
    assert len(journal.records()) == 0
    guest.start_logging()
    guest.request()
    recorded = len(journal.records())
    assert recorded >= 4  # data, status, used entry, used index
    guest.front_end.log_all(False)
    guest.request()
    assert len(journal.records()) == recorded
    assert not journal.recording


class TwoRings(Guest):
    """A guest that uses both rings of its disk."""

    def __init__(self, ram: int, log: int) -> None:
        super().__init__(ram, log)
        self.second = RingDriver(guest_memory(ram, (0, RAM_BYTES, 0)), 12 * PAGE)
        self.front_end.start_ring(self.driver)
        self.front_end.start_ring(self.second, 1)
        self.start_logging()
        self.front_end.set_ring_address(self.driver, logged=True)
        self.front_end.set_ring_address(self.second, index=1, logged=True)

    def read_page(self, driver: RingDriver, gpa: int) -> None:
        """Read a page of the disk to `gpa` through the ring of `driver`."""
        driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
        driver.submit([Buffer(HEADER, 16), Buffer(gpa, PAGE, WRITE), Buffer(STATUS, 1, WRITE)])
        self.front_end.serve()
        assert read_stamp(driver.read(gpa, PAGE)) is not None

    def stop(self, ring: int) -> int:
        """Stop a ring; its base."""
        answer = self.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", ring, 0))
        index, base = struct.unpack("<II", answer)
        assert index == ring
        return int(base)

    def logged(self) -> set[int]:
        """The pages in the log."""
        bits = int.from_bytes(os.pread(self.log, LOG_BYTES, 0), "little")
        return {page for page in range(RAM_BYTES // PAGE) if bits >> page & 1}


@pytest.fixture
def two_rings(files: tuple[int, int]) -> Iterator[TwoRings]:
    guest = TwoRings(*files)
    yield guest
    guest.front_end.close()


def test_each_ring_is_in_the_log_when_its_own_stop_is_answered(two_rings: TwoRings) -> None:
    two_rings.read_page(two_rings.driver, DATA)
    two_rings.stop(0)
    assert DATA // PAGE in two_rings.logged()


def test_a_request_between_two_stops_is_in_the_log_and_in_time(two_rings: TwoRings) -> None:
    session = two_rings.front_end.session
    two_rings.read_page(two_rings.driver, DATA)
    two_rings.read_page(two_rings.driver, DATA)
    assert two_rings.stop(0) == 2
    assert session.running
    two_rings.read_page(two_rings.second, DATA + PAGE)
    record = next(it for it in session.journal.records() if it["gpa"] == DATA + PAGE)
    assert record["queue"] == 1
    assert two_rings.stop(1) == 1
    assert not session.running
    assert DATA // PAGE + 1 in two_rings.logged()
    for link in TRACED_LINKS:
        assert session.collector.trace.links[link].last(DATA + PAGE) >= record["epoch"] > 0


def test_what_is_harvested_after_the_last_stop_is_too_late(two_rings: TwoRings) -> None:
    session = two_rings.front_end.session
    two_rings.stop(0)
    two_rings.stop(1)
    session.collector.harvest_everything()
    assert session.collector.trace.links[Link.LOG].last(DATA) == 0
    two_rings.front_end.start_ring(two_rings.driver, base=0, logged=True)
    session.collector.harvest_everything()
    assert session.collector.trace.links[Link.LOG].last(DATA) > 0, "it runs again"


def test_a_reset_brings_what_was_written_to_the_log(two_rings: TwoRings) -> None:
    two_rings.read_page(two_rings.second, DATA + PAGE)
    two_rings.front_end.send(Request.RESET_DEVICE)
    assert DATA // PAGE + 1 in two_rings.logged()
    assert not two_rings.front_end.session.running
