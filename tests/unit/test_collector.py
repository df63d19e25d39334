"""When a harvest happens, and that nothing is left behind where tracking ends or begins anew."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dmaproof.collector import Collector
from dmaproof.dirty_log import BufferDirtyLog
from dmaproof.dirty_tracker import EmulatedTracker, emulated_trackers
from dmaproof.guest_memory import GuestMemory, IovaMap
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


def test_the_last_harvest_is_at_the_end(memory: GuestMemory, tracker: EmulatedTracker) -> None:
    log = bytearray(8)
    collector = started(memory, tracker, log)
    tracker.dma(3 * PAGE, 1)
    collector.stop()
    assert pages(log) == [3]
    assert not collector.active


def test_a_new_map_loses_nothing_of_the_old_one(
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


def test_a_second_start_begins_anew(memory: GuestMemory, tracker: EmulatedTracker) -> None:
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
    assert [(it.epoch, it.pages, it.merged) for it in collector.harvests] == [(1, 1, 1)]


def test_without_a_log_nothing_happens(memory: GuestMemory, tracker: EmulatedTracker) -> None:
    collector = Collector(tracker)
    collector.remap(memory, IovaMap.identity(memory))
    collector.harvest_write(0, PAGE)
    assert collector.harvest() == 0
    collector.stop()
    with pytest.raises(RuntimeError, match="logging is off"):
        collector.switch_log(BufferDirtyLog(bytearray(8)))


class LostLog(BufferDirtyLog):
    """A log that takes nothing more."""

    def merge(self, *arguments: object) -> None:
        raise OSError("gone")


def test_a_log_that_fails_still_ends(memory: GuestMemory, tracker: EmulatedTracker) -> None:
    collector = Collector(tracker)
    log = LostLog(bytearray(8))
    collector.start(log, memory, IovaMap.identity(memory))
    tracker.dma(0, 1)
    with pytest.raises(OSError, match="gone"):
        collector.stop()
    assert not collector.active
    with pytest.raises(ValueError, match="released"):
        len(log.memory)
    tracker.start(IovaMap.identity(memory).ranges, PAGE)  # it had been stopped
