"""The journal records every write of one migration, in memory and in its file."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from dmaproof.collector import Collector
from dmaproof.devices.blk import Blk
from dmaproof.dirty_log import BufferDirtyLog
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.guest_memory import IovaMap
from dmaproof.journal import RECORD, Journal, WriteKind
from dmaproof.trace import Link
from dmaproof.vhost_user.keeper import Keeper
from qmp_tools.testbed.ring_driver import PAGE, guest_memory, ram_fd


def write(journal: Journal, gpa: int, *, epoch: int = 1) -> None:
    journal.write(WriteKind.DATA, gpa + 7 * PAGE, gpa, b"data", epoch)


def test_a_record_has_the_request_the_addresses_the_data_and_the_time() -> None:
    journal = Journal()
    before_ns = time.monotonic_ns()
    journal.start()
    journal.request, journal.queue = 5, 3
    journal.write(WriteKind.USED_RING, 0x7000, 0x2000, b"some bytes", 9)
    after_ns = time.monotonic_ns()
    (record,) = journal.records()
    assert before_ns <= record["time_ns"] <= after_ns
    assert journal.started_ns is not None
    assert before_ns <= journal.started_ns <= int(record["time_ns"])
    fields = ("request", "queue", "kind", "iova", "gpa", "epoch")
    assert [int(record[field]) for field in fields] == [
        *(5, 3, WriteKind.USED_RING),
        *(0x7000, 0x2000, 9),
    ]
    assert (record["length"], record["checksum"]) == (10, zlib.crc32(b"some bytes"))


def test_a_write_without_a_request_has_request_0_and_queue_0() -> None:
    journal = Journal()
    journal.start()
    write(journal, 0)
    (record,) = journal.records()
    assert (record["request"], record["queue"]) == (0, 0)


def test_writes_before_start_and_after_stop_are_only_counted() -> None:
    journal = Journal()
    assert journal.recording is False
    assert journal.started_ns is None
    write(journal, 0)
    assert len(journal.records()) == 0
    journal.start()
    assert journal.recording
    write(journal, PAGE)
    journal.stop()
    assert journal.recording is False
    write(journal, 2 * PAGE)
    assert journal.records()["gpa"].tolist() == [PAGE]
    assert (journal.writes, journal.bytes_written) == (3, 12)


def test_a_record_is_written_to_the_file_immediately(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "records")
    journal.start()
    for page in range(3):
        write(journal, page * PAGE)
        assert (np.fromfile(tmp_path / "records", RECORD) == journal.records()).all()
        assert len(journal.records()) == page + 1
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        write(journal, 0)


def test_a_second_migration_begins_with_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "records")
    for migration in (1, 2):
        journal.start()
        write(journal, migration * PAGE)
        assert journal.records()["gpa"].tolist() == [migration * PAGE]
        assert np.fromfile(tmp_path / "records", RECORD)["gpa"].tolist() == [migration * PAGE]
        journal.stop()


@pytest.mark.parametrize("half", [0, 1, RECORD.itemsize // 2, RECORD.itemsize - 1])
def test_an_incomplete_record_is_replaced_by_the_next_one(tmp_path: Path, half: int) -> None:
    file = tmp_path / "records"
    killed = Journal(file)
    killed.start()
    for page in (1, 2):
        write(killed, page * PAGE)
    killed.close()
    with file.open("ab") as end:
        end.write(b"\xff" * half)
    successor = Journal(file)
    successor.resume(77)
    assert successor.recording
    assert successor.started_ns == 77
    assert successor.records()["gpa"].tolist() == [PAGE, 2 * PAGE]
    write(successor, 3 * PAGE)
    assert successor.records()["gpa"].tolist() == [PAGE, 2 * PAGE, 3 * PAGE]
    assert (np.fromfile(file, RECORD) == successor.records()).all()


def collector_of(fd: int) -> Collector:
    """Return a collector that has just been started, over 8 pages of RAM."""
    collector = Collector(emulated_trackers()["iommu"]())
    memory = guest_memory(fd, (0, 8 * PAGE, 0))
    collector.start(BufferDirtyLog(bytearray(8)), memory, IovaMap.identity(memory))
    return collector


def test_a_successor_continues_journal_harvests_and_epochs(tmp_path: Path) -> None:
    with ram_fd(8 * PAGE) as fd:
        memory = guest_memory(fd, (0, 8 * PAGE, 0))
        killed, collector = Keeper(tmp_path), collector_of(fd)
        killed.journal.start()
        collector.harvest()
        collector.harvest()
        collector.trace.see(Link.LOG, PAGE, 1)
        killed.keep(collector, memory)
        # Two more harvests happened, whose state was not saved.
        write(killed.journal, PAGE, epoch=collector.due_epoch() + 2)

        successor, resumed = Keeper(tmp_path), collector_of(fd)
        assert successor.resume(resumed)
        assert successor.journal.started_ns == killed.journal.started_ns
        assert successor.journal.records()["gpa"].tolist() == [PAGE]
        assert resumed.harvests == collector.harvests
        assert len(resumed.harvests) == 2
        assert resumed.trace.links[Link.LOG].last(PAGE) == 2
        assert resumed.due_epoch() == 5, "a later harvest would have to report an earlier write"


def test_a_successor_continues_the_numbers_of_the_harvests(tmp_path: Path) -> None:
    with ram_fd(8 * PAGE) as fd:
        killed, collector = Keeper(tmp_path), collector_of(fd)
        killed.journal.start()
        for _ in range(4):
            collector.harvest()
        killed.keep(collector, guest_memory(fd, (0, 8 * PAGE, 0)))
        resumed = collector_of(fd)
        assert Keeper(tmp_path).resume(resumed)
        assert resumed.due_epoch() == 5


def test_requests_are_numbered_from_the_time_in_microseconds_if_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 5_000_000_999)
    device = Blk(PAGE)
    Keeper(None).number_requests(device)
    assert device.requests == 0
    Keeper(tmp_path).number_requests(device)
    assert device.requests == 5_000_000
    device.requests = 6_000_000
    Keeper(tmp_path).number_requests(device)
    assert device.requests == 6_000_000


def test_the_successor_of_an_idle_process_begins_with_the_first_harvest(tmp_path: Path) -> None:
    with ram_fd(8 * PAGE) as fd:
        idle = Keeper(tmp_path)
        idle.keep(collector_of(fd), guest_memory(fd, (0, 8 * PAGE, 0)))
        successor, resumed = Keeper(tmp_path), collector_of(fd)
        assert successor.resume(resumed)
        assert resumed.due_epoch() == 1
        assert successor.journal.started_ns == 0, "the journal never began to record"


def test_the_successor_of_a_process_that_never_logged_starts_empty(tmp_path: Path) -> None:
    with ram_fd(8 * PAGE) as fd:
        assert not Keeper(tmp_path).resume(collector_of(fd))
        assert not Keeper(None).resume(collector_of(fd))
