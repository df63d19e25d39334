"""Injected faults: each breaks only what its summary says, at places chosen by its seed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dmaproof.collector import Collector
from dmaproof.dirty_log import BufferDirtyLog
from dmaproof.dirty_tracker import EmulatedTracker, emulated_trackers
from dmaproof.dirty_tracker.address_queue import AddressQueue
from dmaproof.dma import Dma
from dmaproof.errors import UsageError
from dmaproof.faults import known_faults, make_fault, summary
from dmaproof.faults.timing import BitBeforeData
from dmaproof.guest_memory import GuestMemory, IovaMap, IovaMapping
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.journal import Journal, WriteKind
from dmaproof.trace import ChainTrace, Link
from qmp_tools.testbed.ring_driver import PAGE, RingDriver, guest_memory, ram_fd
from support.front_end import FrontEnd

RAM_PAGES = 200
HIGH = 4 << 30


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ram_fd(RAM_PAGES * PAGE) as fd:
        yield guest_memory(fd, (0, RAM_PAGES * PAGE, 0))


def pages_in(buffer: bytearray) -> set[int]:
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


# Texts for users --------------------------------------------------------------------------------


def test_every_fault_has_a_summary_of_one_line() -> None:
    for name, fault in known_faults().items():
        assert len(summary(fault)) > 20, name
        assert summary(fault).endswith("."), name
        if name == "index-kept-at-reset":
            assert fault.link is None, "it loses no page"
        else:
            assert fault.link in set(Link) - {Link.QEMU}
        assert bool(fault.value_means) == bool(fault.default)


@pytest.mark.parametrize(
    "spec",
    [
        "drop-pages=",
        "drop-pages=0",
        "drop-pages=1.1",
        "drop-pages=nan",
        "drop-pages=many",
        "used-ring-unlogged=1",
        "gremlins=1",
        "",
    ],
)
def test_a_malformed_fault_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="fault"):
        make_fault(spec, 1)


# Log --------------------------------------------------------------------------------------------


def merged(
    spec: str | None, seed: int, pages: set[int], *, times: int = 1, gpa: int = 0
) -> set[int]:
    """Return those of `pages`, counted from `gpa`, that reach the log."""
    log = bytearray((gpa // PAGE + 4096) // 8)
    words = np.zeros(64, dtype=np.uint64)
    for page in pages:
        words[page // 64] |= np.uint64(1 << page % 64)
    wrapped = make_fault(spec, seed).wrap_log(BufferDirtyLog(log))
    for _ in range(times):
        wrapped.merge(gpa, words, 0, 4096)
    wrapped.close()
    return {page - gpa // PAGE for page in pages_in(log)}


ALL = set(range(4096))


def test_dropped_pages_follow_from_the_seed_and_the_page() -> None:
    arrived = merged("drop-pages=0.1", 1, ALL)
    assert 0.07 < 1 - len(arrived) / len(ALL) < 0.13
    assert merged("drop-pages=0.1", 1, ALL) == arrived != merged("drop-pages=0.1", 2, ALL)
    assert merged("drop-pages=0.1", 1, ALL, times=3) == arrived, "further merges do not add them"
    assert merged("drop-pages=0.1", 1, {5, 900}) == arrived & {5, 900}
    assert merged("drop-pages=1", 1, {5, 900}) == set()
    assert merged(None, 1, {5, 900}) == {5, 900}


def test_each_merge_drops_other_bits() -> None:
    once, twice = merged("drop-bits=0.1", 1, ALL), merged("drop-bits=0.1", 1, ALL, times=2)
    assert merged("drop-bits=0.1", 1, ALL) == once != merged("drop-bits=0.1", 2, ALL)
    assert once < twice
    assert len(ALL - twice) < len(ALL - once) / 2, "most are set by the second merge"


def test_bits_of_a_high_slot_are_dropped() -> None:
    assert merged("forget-high-slot", 1, {3, 70}) == {3, 70}
    assert merged("forget-high-slot", 1, {3, 70}, gpa=HIGH) == set()
    assert merged("forget-high-slot", 1, {3, 70}, gpa=HIGH - 64 * PAGE) == {3}


def collecting(
    spec: str | None, memory: GuestMemory
) -> tuple[Collector, EmulatedTracker, bytearray]:
    """Return a started collector, its tracker, and its log."""
    fault = make_fault(spec, 1)
    tracker = fault.wrap_tracker(emulated_trackers()[fault.tracker or "iommu"]())
    log = bytearray(RAM_PAGES // 64 * 8 + 8)
    collector = fault.make_collector(tracker)
    collector.start(BufferDirtyLog(log), memory, IovaMap.identity(memory))
    return collector, tracker, log


@pytest.mark.parametrize("spec", [None, "log-not-switched"])
def test_bits_go_to_the_old_log_after_a_switch(spec: str | None, memory: GuestMemory) -> None:
    collector, tracker, old = collecting(spec, memory)
    tracker.dma(PAGE, 1)
    new = bytearray(old)
    collector.switch_log(BufferDirtyLog(new))
    assert pages_in(old) == {1}
    tracker.dma(2 * PAGE, 1)
    collector.harvest()
    assert (pages_in(old), pages_in(new)) == (({1, 2}, set()) if spec else ({1}, {2}))
    collector.stop()


@pytest.mark.parametrize("spec", [None, "non-atomic-or"])
def test_bits_that_another_device_sets_meanwhile_are_overwritten(
    spec: str | None, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, tracker, log = collecting(spec, memory)
    others = 0

    def meanwhile(_: float) -> None:
        nonlocal others
        others += 1
        log[0] |= 1 << 3
        log[8] |= 1 << 6  # in a word that this device does not change

    monkeypatch.setattr(time, "sleep", meanwhile)
    tracker.dma(0, 1)
    collector.harvest()
    assert others == bool(spec)
    assert pages_in(log) == {0, *({70} if spec else ())}
    collector.stop()


# Iterator ---------------------------------------------------------------------------------------


def iterated(
    spec: str | None, ranges: list[tuple[int, int]], pages: int, seed: int = 0
) -> set[int]:
    """Return the bits that reports of (first page, pages) set; `set` and `set_many` must agree."""
    found = []
    for many in (False, True):
        words = np.zeros(pages // 64 + 1, dtype=np.uint64)
        trace = ChainTrace([IovaRange(0, pages * PAGE)])
        trace.epoch = 1
        with make_fault(spec, seed).make_bitmap(0, pages * PAGE, PAGE, words) as bitmap:
            bitmap.trace, bitmap.gpa = trace, 0
            if many:
                iovas, lengths = np.array(ranges, dtype=np.uint64).T * np.uint64(PAGE)
                bitmap.set_many(iovas, lengths)
            else:
                for first, count in ranges:
                    bitmap.set(first * PAGE, count * PAGE)
        reported = {page for first, count in ranges for page in range(first, first + count)}
        assert set(np.flatnonzero(trace.links[Link.TRACKER].array)) == reported
        found.append(pages_in(bytearray(words.tobytes())))
    assert found[0] == found[1]
    return found[0]


def test_one_window_is_skipped() -> None:
    assert iterated(None, [(0, 1000)], 1000) == set(range(1000))
    for seed in (0, 3, 11):
        skipped = set(range(1000)) - iterated("skip-window", [(0, 900), (900, 100)], 1000, seed)
        first = seed % 8 * 64
        assert skipped == {
            page for start in (first, first + 512) for page in range(start, start + 64)
        } & set(range(1000))


def test_the_last_partial_word_is_skipped() -> None:
    assert iterated("forget-last-word", [(0, 100)], 100) == set(range(64))
    assert iterated("forget-last-word", [(3, 2), (70, 5)], 100) == {3, 4}
    assert iterated("forget-last-word", [(0, 128)], 128) == set(range(128))


def test_a_range_loses_its_first_or_its_last_page() -> None:
    ranges = [(2, 1), (5, 3), (90, 10)]
    exact = {2, *range(5, 8), *range(90, 100)}
    assert iterated("off-by-one-start", ranges, 100) == exact - {5, 90}
    assert iterated("off-by-one-end", ranges, 100) == exact - {7, 99}


def test_one_length_applies_to_all_ranges() -> None:
    words = np.zeros(2, dtype=np.uint64)
    with make_fault("forget-last-word", 0).make_bitmap(0, 100 * PAGE, PAGE, words) as bitmap:
        bitmap.trace, bitmap.gpa = ChainTrace([IovaRange(0, 100 * PAGE)]), 0
        bitmap.set_many(np.array([3, 70], dtype=np.uint64) * np.uint64(PAGE), 2 * PAGE)
    assert pages_in(bytearray(words.tobytes())) == {3, 4}


# Tracker ----------------------------------------------------------------------------------------


def tracked(tracker: EmulatedTracker, pages: int = 1024) -> set[int]:
    """Return the pages that a tracker reports."""
    words = np.zeros(pages // 64, dtype=np.uint64)
    with IovaBitmap(0, pages * PAGE, PAGE, words) as bitmap:
        tracker.read_and_clear(bitmap, 0, pages * PAGE)
    return pages_in(bytearray(words.tobytes()))


def started(spec: str | None, seed: int = 1) -> EmulatedTracker:
    fault = make_fault(spec, seed)
    tracker = fault.wrap_tracker(emulated_trackers()[fault.tracker or "iommu"]())
    tracker.start([IovaRange(0, 1024 * PAGE)], PAGE)
    return tracker


def test_an_overflow_is_ignored() -> None:
    intact = AddressQueue(queue_entries=4)
    intact.start([IovaRange(0, 1024 * PAGE)], PAGE)
    broken = started("ignore-overflow=4")
    for page in range(6):
        intact.dma(page * PAGE, 1)
        broken.dma(page * PAGE, 1)
    assert tracked(intact) == set(range(1024))
    assert tracked(broken) == set(range(4))
    broken.dma(PAGE, 1)
    assert tracked(broken) == {1}


def test_a_huge_page_is_reported_as_its_first_4_kib() -> None:
    tracker = started("huge-page-as-4k")
    tracker.dma(700 * PAGE, 1)
    assert tracked(tracker) == {512}
    tracker.dma(0, 1024 * PAGE)
    assert tracked(tracker) == {0, 512}


def test_clearing_comes_before_reading() -> None:
    def harvests(share: str, seed: int) -> list[bool]:
        tracker = started(f"clear-before-read={share}", seed)
        found = []
        for _ in range(40):
            tracker.dma(5 * PAGE, 1)
            found.append(tracked(tracker) == {5})
        return found

    assert not any(harvests("1", 1))
    assert 20 < sum(harvests("0.25", 1)) < 39
    assert harvests("0.25", 1) == harvests("0.25", 1) != harvests("0.25", 2)


# Translation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [None, "iova-as-gpa"])
def test_iovas_are_logged_as_gpas(spec: str | None, memory: GuestMemory) -> None:
    collector, tracker, log = collecting(spec, memory)
    elsewhere = IovaMap([IovaMapping(0, 100 * PAGE, 8 * PAGE)])
    collector.remap(memory, elsewhere)
    tracker.dma(3 * PAGE, 1)
    collector.harvest()
    assert pages_in(log) == ({3} if spec else {103})
    collector.start(BufferDirtyLog(log), memory, elsewhere)
    tracker.dma(4 * PAGE, 1)
    collector.harvest()
    assert pages_in(log) == ({3, 4} if spec else {103, 104})
    collector.stop()


@pytest.mark.parametrize("spec", [None, "old-memory-table"])
def test_the_new_memory_table_is_ignored(spec: str | None, memory: GuestMemory) -> None:
    collector, tracker, log = collecting(spec, memory)
    collector.remap(memory, IovaMap([*collector_map(memory), IovaMapping(HIGH, 0, PAGE)]))
    tracker.dma(HIGH, 1)
    tracker.dma(9 * PAGE, 1)
    collector.harvest()
    assert pages_in(log) == ({9} if spec else {0, 9})
    collector.stop()


def collector_map(memory: GuestMemory) -> list[IovaMapping]:
    return [IovaMapping(PAGE, PAGE, (RAM_PAGES - 1) * PAGE)] if memory.slots else []


# Device -----------------------------------------------------------------------------------------


class Marks:
    """A tracker that records the reported ranges and their content at that moment."""

    def __init__(self, memory: GuestMemory) -> None:
        self.reported: list[tuple[int, int]] = []
        self.seen: list[bytes] = []
        self._memory = memory

    def dma(self, iova: int, length: int) -> None:
        self.reported.append((iova, length))
        self.seen.append(bytes(self._memory.view(iova, length)))


def dma_with(spec: str | None, memory: GuestMemory, seed: int = 1) -> tuple[Dma, Marks]:
    marks = Marks(memory)
    dma = make_fault(spec, seed).make_dma(
        memory, IovaMap.identity(memory), marks, Journal(), due_epoch=lambda: 1
    )
    return dma, marks


@pytest.mark.parametrize(
    ("spec", "unlogged"),
    [
        (None, None),
        ("used-ring-unlogged", WriteKind.USED_RING),
        ("status-unlogged", WriteKind.STATUS),
    ],
)
def test_one_kind_of_write_is_not_reported_to_the_tracker(
    spec: str | None, unlogged: WriteKind | None, memory: GuestMemory
) -> None:
    dma, marks = dma_with(spec, memory)
    for kind in WriteKind:
        dma.write(kind * PAGE, b"x", kind)
        assert bytes(memory.view(kind * PAGE, 1)) == b"x"
    assert marks.reported == [(kind * PAGE, 1) for kind in WriteKind if kind != unlogged]
    assert dma.journal.writes == len(WriteKind)


# Timing -----------------------------------------------------------------------------------------


def test_the_bit_comes_before_the_data(memory: GuestMemory) -> None:
    def early(seed: int) -> set[int]:
        dma, marks = dma_with("bit-before-data=0.0001", memory, seed)
        dma.journal.start()
        for page in range(RAM_PAGES):
            memory.view(page * PAGE, 1)[:] = b"-"
            dma.write(page * PAGE, b"x")
        assert bytes(memory.view(0, 1)) == b"x"
        return {page for page, seen in enumerate(marks.seen) if seen == b"-"}

    assert 5 < len(early(1)) < 50, "a tenth of the pages"
    assert early(1) == early(1) != early(2)


def test_data_is_delayed_once_and_only_while_logging(memory: GuestMemory) -> None:
    dma, marks = dma_with("bit-before-data=0.0001", memory)
    for page in range(RAM_PAGES):
        dma.write(page * PAGE, b"x")
    assert set(marks.seen) == {b"x"}, "logging is off"
    fault = BitBeforeData("0.0001", 1)
    chosen = [page for page in range(RAM_PAGES) if fault.chooses(page)]
    assert chosen
    assert not any(fault.chooses(page) for page in range(RAM_PAGES)), "never a second time"


def test_the_final_flush_is_missing(memory: GuestMemory) -> None:
    for spec, expected in ((None, {7}), ("no-final-flush", set())):
        collector, tracker, log = collecting(spec, memory)
        tracker.dma(7 * PAGE, 1)
        collector.flush()
        assert pages_in(log) == expected
        collector.harvest()
        assert pages_in(log) == {7}, "other harvests still work"
        collector.stop()


@contextmanager
def logging_device(fault: str | None) -> Iterator[tuple[FrontEnd, RingDriver, int]]:
    """Yield a device with one ring and a log, its driver, and the log's file."""
    place = (0, 64 * PAGE, 0)
    with ram_fd(place[1]) as ram, ram_fd(64) as log:
        front_end = FrontEnd(fault=fault)
        driver = RingDriver(guest_memory(ram, place), 8 * PAGE)
        front_end.set_memory(ram, place)
        front_end.start_ring(driver)
        front_end.set_log(log, 64)
        front_end.log_all(True)
        yield front_end, driver, log
        front_end.close()


@pytest.mark.parametrize(
    ("spec", "in_log", "in_time"),
    [(None, True, True), ("late-final-flush", True, False), ("no-final-flush", False, False)],
)
def test_the_final_flush_counts_only_before_the_answer(
    spec: str | None, in_log: bool, in_time: bool
) -> None:
    with logging_device(spec) as (front_end, _, log):
        front_end.session.dma.write(20 * PAGE, b"x")
        front_end.stop_ring()
        assert (20 in pages_in(bytearray(os.pread(log, 64, 0)))) is in_log
        seen = front_end.session.collector.trace.links[Link.LOG].last(20 * PAGE)
        assert (seen > 0) is in_time


def test_a_restarted_ring_logs_in_time_again() -> None:
    with logging_device(None) as (front_end, driver, _):
        front_end.stop_ring()
        front_end.start_ring(driver)
        due = front_end.session.collector.due_epoch()
        front_end.session.dma.write(20 * PAGE, b"x")
        front_end.session.collector.harvest()
        assert front_end.session.collector.trace.links[Link.LOG].last(20 * PAGE) == due


def test_the_tracker_starts_late(memory: GuestMemory) -> None:
    collector, tracker, log = collecting("tracker-after-log=3", memory)
    for page in range(6):
        tracker.dma(page * PAGE, 1)
        collector.harvest()
    assert pages_in(log) == {3, 4, 5}
    links = collector.trace.links
    assert [links[Link.TRACKER].last(page * PAGE) for page in range(6)] == [0, 0, 0, 4, 5, 6]
    collector.stop()


@pytest.mark.parametrize("spec", [None, "log-forgotten-at-reset"])
def test_a_reset_device_forgets_the_log_until_the_next_migration(spec: str | None) -> None:
    with logging_device(spec) as (front_end, driver, log):
        front_end.session.dma.write(20 * PAGE, b"before")
        front_end.stop_ring()
        front_end.start_ring(driver)
        front_end.session.dma.write(30 * PAGE, b"after")
        front_end.stop_ring()
        in_log = pages_in(bytearray(os.pread(log, 64, 0)))
        assert in_log & {20, 30} == ({20, 30} if spec is None else {20})
        front_end.log_all(False)
        front_end.set_log(log, 64)
        front_end.log_all(True)
        front_end.session.dma.write(40 * PAGE, b"next")
        front_end.stop_ring()
        assert 40 in pages_in(bytearray(os.pread(log, 64, 0)))


@pytest.mark.parametrize(("spec", "after"), [(None, 2), ("index-kept-at-reset", 5)])
def test_a_reset_device_counts_on_only_while_logging(spec: str | None, after: int) -> None:
    with logging_device(spec) as (front_end, driver, _):

        def stopped_at(base: int) -> int:
            """Start the ring at `base`; return where the device says that the ring has stopped."""
            front_end.start_ring(driver, base=base)
            return front_end.stop_ring()

        front_end.stop_ring()
        assert stopped_at(3) == 3, "nothing was counted before"
        assert stopped_at(2) == after
        front_end.log_all(False)
        assert stopped_at(2) == 2
