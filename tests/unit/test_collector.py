"""When the collector harvests, and that no page is lost when tracking stops or restarts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from dmaproof.collector import Collector
from dmaproof.dirty_log import BufferDirtyLog
from dmaproof.dirty_tracker import EmulatedTracker, emulated_trackers
from dmaproof.errors import MemoryAccessError
from dmaproof.guest_memory import READ, WRITE, Bus, GuestMemory, IovaMap, IovaMapping
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.trace import Link
from qmp_tools.testbed.ring_driver import PAGE, guest_memory, ram_fd


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ram_fd(64 * PAGE) as fd:
        yield guest_memory(fd, (0, 64 * PAGE, 0))


@pytest.fixture
def tracker() -> EmulatedTracker:
    return emulated_trackers()["iommu"]()


def pages(log: bytearray) -> list[int]:
    bits = np.unpackbits(np.frombuffer(log, np.uint8), bitorder="little")
    return [int(page) for page in np.flatnonzero(bits)]


def started(memory: GuestMemory, tracker: EmulatedTracker, log: bytearray) -> Collector:
    collector = Collector(tracker)
    collector.start(BufferDirtyLog(log), memory, IovaMap.identity(memory))
    return collector


def test_stop_harvests_a_last_time(memory: GuestMemory, tracker: EmulatedTracker) -> None:
    log = bytearray(8)
    collector = started(memory, tracker, log)
    tracker.dma(3 * PAGE, 1)
    collector.stop()
    assert pages(log) == [3]
    assert not collector.active


def test_a_remap_loses_no_page_of_the_old_map(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    log = bytearray(8)
    collector = started(memory, tracker, log)
    tracker.dma(3 * PAGE, 1)
    collector.remap(memory, IovaMap.identity(memory))
    assert pages(log) == [3]
    tracker.dma(5 * PAGE, 1)
    collector.harvest()
    assert pages(log) == [3, 5]


def test_a_second_start_begins_with_a_new_trace(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    old, new = bytearray(8), bytearray(8)
    collector = started(memory, tracker, old)
    tracker.dma(PAGE, 1)
    collector.harvest()
    tracker.dma(2 * PAGE, 1)
    collector.start(BufferDirtyLog(new), memory, IovaMap.identity(memory))
    assert pages(old) == [1, 2]
    assert collector.harvests == []
    assert collector.due_epoch() == 1
    tracker.dma(4 * PAGE, 1)
    collector.harvest()
    assert pages(new) == [4]
    assert [(harvest.epoch, harvest.pages, harvest.merged) for harvest in collector.harvests] == [
        (1, 1, 1)
    ]


def test_pages_after_the_stop_are_not_merged_in_time(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    log = bytearray(8)
    collector = Collector(tracker)
    collector.start(BufferDirtyLog(log), memory, IovaMap.identity(memory))
    collector.trace.freeze()
    tracker.dma(PAGE, 1)
    collector.harvest()
    assert pages(log) == [1]
    assert [(harvest.pages, harvest.merged) for harvest in collector.harvests] == [(1, 0)]


def test_without_a_log_nothing_happens(memory: GuestMemory, tracker: EmulatedTracker) -> None:
    collector = Collector(tracker)
    collector.remap(memory, IovaMap.identity(memory))
    collector.harvest_write(0, PAGE)
    assert collector.harvest() == 0
    collector.stop()
    with pytest.raises(RuntimeError, match="logging is off"):
        collector.switch_log(BufferDirtyLog(bytearray(8)))


class LostLog(BufferDirtyLog):
    """A log that accepts no pages any more."""

    def merge(self, *arguments: object) -> None:
        raise OSError("gone")


def test_stop_ends_tracking_even_if_the_log_fails(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    collector = Collector(tracker)
    log = LostLog(bytearray(8))
    collector.start(log, memory, IovaMap.identity(memory))
    tracker.dma(0, 1)
    with pytest.raises(OSError, match="gone"):
        collector.stop()
    assert not collector.active
    with pytest.raises(ValueError, match="released"):
        len(log.memory)
    tracker.start(IovaMap.identity(memory).ranges, PAGE)  # allowed only after stop


def traced(memory: GuestMemory, tracker: EmulatedTracker, log: bytearray, bus: Bus) -> Collector:
    collector = Collector(tracker)
    collector.start(BufferDirtyLog(log), memory, bus)
    return collector


@pytest.mark.parametrize(
    ("iova", "length", "found"),
    [
        (3 * PAGE, 1, [3]),
        (3 * PAGE, PAGE, [3]),
        (4 * PAGE - 1, 1, [3]),
        (4 * PAGE - 1, 2, [3, 4]),
        (3 * PAGE + 5, 3 * PAGE, [3, 4, 5, 6]),
        (63 * PAGE, PAGE, [63]),
    ],
)
def test_an_immediate_harvest_reports_only_the_pages_of_the_write(
    memory: GuestMemory, tracker: EmulatedTracker, iova: int, length: int, found: list[int]
) -> None:
    log = bytearray(8)
    collector = started(memory, tracker, log)
    tracker.dma(10 * PAGE, 1)
    tracker.dma(iova, length)
    collector.harvest_write(iova, length)
    assert pages(log) == found
    assert collector.due_epoch() == 2
    assert collector.harvests == []
    collector.harvest()
    assert pages(log) == sorted([*found, 10])


def test_an_immediate_harvest_follows_every_mapping_of_the_write(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    log = bytearray(8)
    bus = IovaMap(
        IovaMapping(0x100000 + at * PAGE, gpa * PAGE, PAGE) for at, gpa in enumerate((9, 4, 30))
    )
    collector = traced(memory, tracker, log, bus)
    tracker.dma(0x100000 + PAGE - 1, PAGE + 2)
    collector.harvest_write(0x100000 + PAGE - 1, PAGE + 2)
    assert pages(log) == [4, 9, 30]


class WriteOnly(IovaMap):
    """A map that allows only writes."""

    def translate(self, iova: int, length: int, access: int = READ) -> list[tuple[int, int]]:
        if access != WRITE:
            raise MemoryAccessError("not for reading")
        return super().translate(iova, length, access)


def test_a_write_only_page_can_be_harvested_immediately(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    log = bytearray(8)
    collector = traced(memory, tracker, log, WriteOnly([IovaMapping(0, 0, 64 * PAGE)]))
    tracker.dma(PAGE, 1)
    collector.harvest_write(PAGE, 1)
    assert pages(log) == [1]


def test_unmap_harvests_only_the_unmapped_ranges(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    log = bytearray(8)
    collector = Collector(tracker)
    collector.unmap([IovaMapping(0, 0, PAGE)])  # does nothing without a log
    assert collector.due_epoch() == 1
    collector = traced(memory, tracker, log, IovaMap([IovaMapping(1 << 30, 8 * PAGE, 8 * PAGE)]))
    tracker.dma((1 << 30) + PAGE, 1)
    tracker.dma((1 << 30) + 2 * PAGE, 1)
    collector.unmap([IovaMapping((1 << 30) + 2 * PAGE, 10 * PAGE, PAGE)])
    assert pages(log) == [10]
    assert collector.due_epoch() == 2
    collector.harvest()
    assert pages(log) == [9, 10]


def test_reporting_everything_sets_every_page_of_every_slot(tracker: EmulatedTracker) -> None:
    with ram_fd(64 * PAGE) as fd:
        slots = guest_memory(fd, (0, 3 * PAGE, 0), (32 * PAGE, 2 * PAGE, 8 * PAGE))
        log = bytearray(8)
        collector = started(slots, tracker, log)
        collector.harvest_everything()
        assert pages(log) == [0, 1, 2, 32, 33]
        assert collector.trace.merged_pages == 5
        assert collector.trace.links[Link.TRACKER].last(33 * PAGE) == 1


def test_a_new_log_receives_only_the_pages_written_after_the_switch(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    old, new = bytearray(8), bytearray(8)
    collector = started(memory, tracker, old)
    tracker.dma(PAGE, 1)
    collector.switch_log(BufferDirtyLog(new))
    tracker.dma(2 * PAGE, 1)
    collector.harvest()
    assert (pages(old), pages(new)) == ([1], [2])
    assert collector.trace.links[Link.LOG].last(2 * PAGE) == 2
    assert collector.trace.merged_pages == 2
    assert collector.active


def test_each_harvest_records_its_number_its_time_and_its_pages(
    memory: GuestMemory, tracker: EmulatedTracker
) -> None:
    before_ns = time.monotonic_ns()
    collector = started(memory, tracker, bytearray(8))
    for count in (3, 2):
        tracker.dma(0, count * PAGE)
        assert collector.harvest() == count
    after_ns = time.monotonic_ns()
    assert [(harvest.epoch, harvest.pages, harvest.merged) for harvest in collector.harvests] == [
        (1, 3, 3),
        (2, 2, 2),
    ]
    assert collector.due_epoch() == 3
    assert collector.started_ns is not None
    moments = [before_ns, collector.started_ns]
    for harvest in collector.harvests:
        moments += [harvest.time_ns, harvest.time_ns + harvest.duration_ns]
    assert [*moments, after_ns] == sorted([*moments, after_ns])


def test_a_collector_that_was_never_started_has_no_harvests(tracker: EmulatedTracker) -> None:
    collector = Collector(tracker)
    assert collector.harvests == []
    assert collector.started_ns is None
    assert collector.due_epoch() == 1


class Sizes:
    """A tracker that records the page sizes in bytes with which it is started."""

    def __init__(self) -> None:
        self.page_sizes: list[int] = []

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        self.page_sizes.append(page_size)
        return page_size

    def stop(self) -> None:
        pass

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        pass


def test_the_tracker_is_started_with_the_logs_page_size(memory: GuestMemory) -> None:
    sizes = Sizes()
    collector = Collector(sizes)
    collector.start(BufferDirtyLog(bytearray(8)), memory, IovaMap.identity(memory))
    collector.remap(memory, IovaMap.identity(memory))
    assert sizes.page_sizes == [4096, 4096]


def test_ram_that_ends_inside_a_word_is_reported_to_its_end(tracker: EmulatedTracker) -> None:
    with ram_fd(130 * PAGE) as fd:
        log = bytearray(24)
        collector = started(guest_memory(fd, (0, 130 * PAGE, 0)), tracker, log)
        tracker.dma(129 * PAGE, 1)
        collector.harvest()
        assert pages(log) == [129]
