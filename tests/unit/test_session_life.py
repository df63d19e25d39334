"""What a session keeps and releases over the life of its rings and logs."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import selectors
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmaproof.devices.blk import Blk
from dmaproof.devices.rng import Rng
from dmaproof.errors import ProtocolError
from dmaproof.evidence import Evidence
from dmaproof.stamp import read_stamp
from dmaproof.trace import TRACED_LINKS, Link
from dmaproof.vhost_user.features import (
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    PROTOCOL_FEATURES,
)
from dmaproof.vhost_user.messages import ProtocolFeature, Request, encode_request, encode_u64
from dmaproof.vhost_user.vring import Vring
from dmaproof.virtqueue import SplitVirtqueue
from qmp_tools.testbed.ring_driver import (
    PAGE,
    WRITE,
    Buffer,
    PackedDriver,
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

    def __init__(
        self,
        ram: int,
        log: int,
        features: int = FEATURES,
        *,
        device: Blk | None = None,
        state: Path | None = None,
    ) -> None:
        self.front_end = FrontEnd(device, state=state)
        self.log = log
        self.front_end.send(Request.SET_FEATURES, encode_u64(features))
        self.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        self.front_end.set_memory(ram, (0, RAM_BYTES, 0))
        self.driver = RingDriver(guest_memory(ram, (0, RAM_BYTES, 0)), RING)

    def request(self, flags: int = 0) -> int:
        """Read a page from the disk, and return the status byte."""
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
    # The back end interrupts at start, in case its predecessor died before it did.
    os.eventfd_read(guest.front_end.call)
    yield guest
    guest.front_end.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:guest-ram")


def test_a_disabled_ring_serves_no_request(guest: Guest) -> None:
    enable = struct.pack("<II", 0, 0), struct.pack("<II", 0, 1)
    guest.front_end.send(Request.SET_VRING_ENABLE, enable[0])
    assert guest.request() == UNTOUCHED
    guest.front_end.send(Request.SET_VRING_ENABLE, enable[1])
    guest.front_end.serve()
    assert guest.driver.read(STATUS, 1)[0] == DONE


def test_a_ring_is_served_when_it_is_enabled_again(guest: Guest) -> None:
    assert guest.request() == DONE
    guest.front_end.send(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 0))
    guest.driver.write(STATUS, bytes((UNTOUCHED,)))
    guest.driver.publish(0)  # without a kick
    guest.front_end.send(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1))
    guest.front_end.turn()
    assert guest.driver.read(STATUS, 1)[0] == DONE


def test_a_ring_is_served_when_its_kick_is_replaced(guest: Guest) -> None:
    assert guest.request() == DONE
    guest.driver.write(STATUS, bytes((UNTOUCHED,)))
    guest.driver.publish(0)
    guest.front_end.send(Request.SET_VRING_KICK, encode_u64(0), [guest.front_end.kick])
    guest.front_end.turn()
    assert guest.driver.read(STATUS, 1)[0] == DONE


def test_a_kick_that_cannot_be_watched_is_closed(guest: Guest) -> None:
    class FullSelector(selectors.SelectSelector):
        def register(self, *_: Any, **__: Any) -> selectors.SelectorKey:
            raise OSError(errno.ENOSPC, "disk full")

    before = open_files()
    with pytest.raises(OSError, match="disk full"):
        Vring(0, FullSelector()).set_kick(guest.front_end.kick)
    assert open_files() == before


def test_a_driver_that_polls_gets_no_interrupt(guest: Guest) -> None:
    guest.front_end.send(Request.SET_VRING_CALL, encode_u64(1 << 8))
    assert guest.request() == DONE
    with pytest.raises(BlockingIOError):
        os.eventfd_read(guest.front_end.call)


def test_a_ring_whose_address_was_never_set_is_refused(guest: Guest) -> None:
    guest.front_end.send(Request.SET_VRING_NUM, struct.pack("<II", 1, 8))
    guest.front_end.send(Request.SET_VRING_KICK, encode_u64(1), [guest.front_end.kick])
    with pytest.raises(ProtocolError, match="ring 1 was started before SET_VRING_ADDR"):
        guest.front_end.send(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1))


def test_a_ring_beyond_the_end_of_ram_is_refused(guest: Guest) -> None:
    guest.driver.available = RAM_BYTES - (6 + 2 * guest.driver.size) + 2
    with pytest.raises(ProtocolError, match=r"HVA 0x.* is not inside one memory slot"):
        guest.front_end.set_ring_address(guest.driver)


@pytest.mark.parametrize("part", ["available", "used"])
def test_event_structures_of_a_packed_ring_may_end_with_ram(
    files: tuple[int, int], part: str
) -> None:
    guest = Guest(*files, features=FEATURES | F_RING_PACKED)
    driver = PackedDriver(guest_memory(files[0], (0, RAM_BYTES, 0)), RING)
    setattr(driver, part, RAM_BYTES - 4)
    guest.front_end.start_ring(driver)
    assert guest.front_end.session.running
    guest.front_end.close()


def test_a_ring_whose_size_was_never_set_is_refused(guest: Guest) -> None:
    guest.front_end.send(Request.SET_VRING_KICK, encode_u64(1), [guest.front_end.kick])
    guest.front_end.set_ring_address(guest.driver, index=1)
    with pytest.raises(ProtocolError, match="queue size 0 is not between"):
        guest.front_end.send(Request.SET_VRING_ENABLE, struct.pack("<II", 1, 1))


@pytest.mark.parametrize(
    ("part", "length"), [("descriptors", 16 * 8), ("available", 6 + 2 * 8), ("used", 2 + 6 + 8 * 8)]
)
def test_each_part_of_a_ring_may_end_with_ram(
    files: tuple[int, int], part: str, length: int
) -> None:
    guest = Guest(*files)
    setattr(guest.driver, part, RAM_BYTES - length)
    guest.front_end.start_ring(guest.driver)
    assert guest.request() == DONE
    guest.front_end.close()


@pytest.mark.parametrize("negotiated", [True, False])
def test_a_ring_has_only_the_negotiated_features(files: tuple[int, int], negotiated: bool) -> None:
    features = FEATURES | F_RING_EVENT_IDX if negotiated else FEATURES & ~F_RING_INDIRECT_DESC
    guest = Guest(*files, features=features)
    guest.front_end.start_ring(guest.driver)
    guest.driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    buffers = [Buffer(HEADER, 16), Buffer(DATA, PAGE, WRITE), Buffer(STATUS, 1, WRITE)]
    guest.driver.submit(buffers, 20 * PAGE)
    if negotiated:
        guest.front_end.serve()
        avail_event = guest.driver.used + 4 + 8 * guest.driver.size
        assert guest.driver.read(avail_event, 2) == b"\1\0"
    else:
        with pytest.raises(ProtocolError, match=r"indirect descriptor .* not negotiated"):
            guest.front_end.serve()
    guest.front_end.close()


def test_a_device_without_configuration_does_not_offer_any() -> None:
    front_end = FrontEnd(Rng())
    answer = front_end.ask(Request.GET_PROTOCOL_FEATURES)
    assert answer == encode_u64(PROTOCOL_FEATURES & ~ProtocolFeature.CONFIG)
    front_end.close()


def test_messages_are_acknowledged_only_if_that_was_negotiated() -> None:
    front_end = FrontEnd()
    question = encode_request(Request.SET_OWNER, need_reply=True)
    front_end.send_raw(question)
    front_end.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        front_end.socket.recv(1)
    front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
    assert front_end.ask(Request.SET_OWNER, need_reply=True) == encode_u64(0)
    front_end.close()


def test_a_log_set_before_any_ring_stays_empty(files: tuple[int, int]) -> None:
    guest = Guest(*files)
    guest.start_logging()
    guest.front_end.session.harvest()
    assert os.pread(guest.log, LOG_BYTES, 0) == bytes(LOG_BYTES)
    guest.front_end.close()


def test_a_log_may_be_set_before_the_memory_table(files: tuple[int, int]) -> None:
    ram, log = files
    front_end = FrontEnd()
    front_end.set_log(log, LOG_BYTES)
    front_end.log_all(True)
    front_end.set_memory(ram, (0, RAM_BYTES, 0))
    assert front_end.session.collector.active
    front_end.close()


def test_a_session_with_a_truncated_log_can_be_closed(files: tuple[int, int]) -> None:
    guest = Guest(*files)
    guest.front_end.start_ring(guest.driver)
    guest.start_logging()
    assert guest.request() == DONE
    os.ftruncate(guest.log, 0)
    guest.front_end.close()


def test_a_reset_disables_the_rings(guest: Guest) -> None:
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


def test_requests_that_arrive_before_the_kick_is_enabled_are_served(
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


def test_new_eventfds_replace_the_old_ones(guest: Guest) -> None:
    before = open_files()
    for _ in range(5):
        guest.front_end.send(Request.SET_VRING_KICK, encode_u64(0), [guest.front_end.kick])
        guest.front_end.send(Request.SET_VRING_CALL, encode_u64(0), [guest.front_end.call])
    assert open_files() == before
    assert guest.request() == DONE


def test_every_received_file_descriptor_is_closed(guest: Guest) -> None:
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


def test_a_log_is_not_used_before_logging_is_switched_on(guest: Guest) -> None:
    answer = guest.front_end.ask(
        Request.SET_LOG_BASE, struct.pack("<QQ", LOG_BYTES, 0), [guest.log]
    )
    assert answer == encode_u64(0), "the log is accepted"
    assert not guest.front_end.session.collector.active
    guest.front_end.log_all(True)
    assert guest.front_end.session.collector.active


def test_a_session_reports_features_and_logging(guest: Guest) -> None:
    del guest.front_end.events[:]
    guest.start_logging()
    guest.front_end.log_all(False)
    accepted = {"event": "features", "accepted": FEATURES & ~PROTOCOL_FEATURES_BIT}
    assert guest.front_end.events == [
        accepted,
        {"event": "logging", "on": True},
        accepted,
        {"event": "logging", "on": False},
    ]


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


# A turn -----------------------------------------------------------------------------------------


def publish_reads(guest: Guest, requests: int) -> None:
    """Make `requests` reads of a page available, and kick."""
    driver = guest.driver
    driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    buffers = [Buffer(HEADER, 16), Buffer(DATA, PAGE, WRITE), Buffer(STATUS, 1, WRITE)]
    driver.describe(driver.chain(buffers))
    driver.publish(*[0] * requests)
    os.eventfd_write(guest.front_end.kick, 1)
    for key, _ in guest.front_end.selector.select(0):
        key.data()


def test_a_turn_serves_a_bounded_number_of_requests(
    files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(*files)
    guest.driver = RingDriver(guest_memory(files[0], (0, RAM_BYTES, 0)), 8 * PAGE, 128)
    guest.front_end.start_ring(guest.driver)
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)  # requests take no time on this clock
    publish_reads(guest, 128)
    served = []
    while guest.front_end.session.serve_rings():
        served.append(guest.driver.used_index)
    assert served == [64, 128]
    guest.front_end.close()


@pytest.mark.parametrize(("passed_s", "served"), [(0.04, 2), (0.05, 1), (0.06, 1)])
def test_a_turn_ends_with_the_request_that_uses_up_its_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, passed_s: float, served: int
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: passed_s * next(clock))
    publish_reads(guest, 2)
    guest.front_end.session.serve_rings()
    assert guest.driver.used_index == served


class NotYet(Blk):
    """A disk that cannot serve its first queue before its second queue."""

    def is_ready(self, queue: int) -> bool:
        """See `VirtioDevice.is_ready`."""
        return queue == 1 or self.requests > 0


def test_a_ring_waits_until_its_device_is_ready(files: tuple[int, int]) -> None:
    guest = TwoRings(*files, device=NotYet(1 << 30, queues=2))
    guest.driver.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    for driver in (guest.driver, guest.second):
        driver.submit([Buffer(HEADER, 16), Buffer(DATA, PAGE, WRITE), Buffer(STATUS, 1, WRITE)])
        guest.front_end.serve()
        assert driver.used_index == (0 if driver is guest.driver else 1)
    assert guest.driver.used_index == 1
    guest.front_end.close()


# What outlives the process ----------------------------------------------------------------------


class Tracked(Guest):
    """A guest whose back end saves its state in a folder."""

    def __init__(
        self, ram: int, log: int, state: Path, *, predecessor: Tracked | None = None
    ) -> None:
        super().__init__(ram, log, state=state)
        if predecessor is not None:
            assert predecessor.front_end.inflight is not None
            self.front_end.inflight = os.dup(predecessor.front_end.inflight)
            self.front_end.inflight_reply = predecessor.front_end.inflight_reply
            self.driver = predecessor.driver
        self.front_end.track_inflight(2, self.driver.size)
        if predecessor is not None:
            self.start_logging()
        self.front_end.start_ring(
            self.driver, base=self.driver.used_index, logged=predecessor is not None
        )


def test_a_restarted_back_end_continues_the_saved_journal(
    files: tuple[int, int], tmp_path: Path
) -> None:
    predecessor = Tracked(*files, tmp_path / "state")
    predecessor.start_logging()
    assert predecessor.request() == DONE
    predecessor.front_end.session.harvest()
    saved = predecessor.front_end.session.journal.records()
    evidence = Evidence.load(tmp_path / "state")
    assert (evidence.records == saved).all()
    assert [int(epoch) for epoch in evidence.harvests["epoch"]] == [1]
    assert [slot.length for slot in evidence.slots] == [RAM_BYTES]
    assert predecessor.request() == DONE
    saved = predecessor.front_end.session.journal.records()

    successor = Tracked(*files, tmp_path / "state", predecessor=predecessor)
    session = successor.front_end.session
    assert (session.journal.records() == saved).all()
    assert session.collector.harvests[0].epoch == 1
    assert session.collector.due_epoch() > saved["epoch"].max()
    assert successor.request() == DONE
    assert session.journal.records()["request"][-1] > saved["request"].max()
    for guest in (predecessor, successor):
        guest.front_end.close()


def test_the_trace_is_saved_from_the_start_of_logging(
    files: tuple[int, int], tmp_path: Path
) -> None:
    guest = Tracked(*files, tmp_path / "state")
    guest.start_logging()
    evidence = Evidence.load(tmp_path / "state")
    assert evidence.started_ns == guest.front_end.session.journal.started_ns
    assert [slot.length for slot in evidence.slots] == [RAM_BYTES]
    guest.front_end.close()


def test_saved_state_is_not_resumed_without_a_crash(files: tuple[int, int], tmp_path: Path) -> None:
    before = Tracked(*files, tmp_path / "state")
    before.start_logging()
    assert before.request() == DONE
    before.front_end.session.harvest()
    before.front_end.close()
    guest = Guest(*files, state=tmp_path / "state")
    guest.start_logging()
    assert len(guest.front_end.session.journal.records()) == 0
    guest.front_end.close()


def test_a_second_migration_without_a_crash_begins_with_an_empty_journal(
    files: tuple[int, int], tmp_path: Path
) -> None:
    guest = Tracked(*files, tmp_path / "state")
    for _ in range(2):
        guest.start_logging()
        assert guest.request() == DONE
        guest.front_end.session.harvest()
        records = guest.front_end.session.journal.records()
        assert len(set(records["request"].tolist())) == 1, "only the latest request"
        guest.front_end.log_all(False)
    guest.front_end.close()


class TwoRings(Guest):
    """A guest that uses both rings of its disk."""

    def __init__(self, ram: int, log: int, *, device: Blk | None = None) -> None:
        super().__init__(ram, log, device=device)
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
        """Stop a ring, and return its base."""
        answer = self.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", ring, 0))
        index, base = struct.unpack("<II", answer)
        assert index == ring
        return int(base)

    def logged(self) -> set[int]:
        """Return the pages in the log."""
        bits = int.from_bytes(os.pread(self.log, LOG_BYTES, 0), "little")
        return {page for page in range(RAM_BYTES // PAGE) if bits >> page & 1}


@pytest.fixture
def two_rings(files: tuple[int, int]) -> Iterator[TwoRings]:
    guest = TwoRings(*files)
    yield guest
    guest.front_end.close()


def test_writes_of_each_ring_are_logged_before_its_stop_is_answered(two_rings: TwoRings) -> None:
    two_rings.read_page(two_rings.driver, DATA)
    two_rings.stop(0)
    assert DATA // PAGE in two_rings.logged()


def test_a_request_between_two_stops_is_logged_in_time(two_rings: TwoRings) -> None:
    session = two_rings.front_end.session
    two_rings.read_page(two_rings.driver, DATA)
    two_rings.read_page(two_rings.driver, DATA)
    assert two_rings.stop(0) == 2
    assert session.running
    two_rings.read_page(two_rings.second, DATA + PAGE)
    record = next(record for record in session.journal.records() if record["gpa"] == DATA + PAGE)
    assert record["queue"] == 1
    assert two_rings.stop(1) == 1
    assert not session.running
    assert DATA // PAGE + 1 in two_rings.logged()
    for link in TRACED_LINKS:
        assert session.collector.trace.links[link].last(DATA + PAGE) >= record["epoch"] > 0


def test_pages_harvested_after_the_last_stop_count_as_late(two_rings: TwoRings) -> None:
    session = two_rings.front_end.session
    two_rings.stop(0)
    two_rings.stop(1)
    session.collector.harvest_everything()
    assert session.collector.trace.links[Link.LOG].last(DATA) == 0
    two_rings.front_end.start_ring(two_rings.driver, base=0, logged=True)
    session.collector.harvest_everything()
    assert session.collector.trace.links[Link.LOG].last(DATA) > 0, "the ring runs again"


def test_a_reset_logs_the_written_pages(two_rings: TwoRings) -> None:
    two_rings.read_page(two_rings.second, DATA + PAGE)
    two_rings.front_end.send(Request.RESET_DEVICE)
    assert DATA // PAGE + 1 in two_rings.logged()
    assert not two_rings.front_end.session.running
