"""The guests' workload, against a disk in Python."""

from __future__ import annotations

import ctypes
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from dmaproof.errors import UsageError
from dmaproof.stamp import SECTORS_PER_PAGE, stamped_page
from dmaproof.units import PAGE_BYTES
from qmp_tools.guest.workload import PATTERNS, Workload, parse_workload
from support.workload_guest import (
    DISK_SECTORS,
    HOT,
    HUGE_PAGES,
    ONCE,
    OWN,
    OWN_PAGES,
    READ,
    READ_BACK,
    WRITE,
    WorkloadGuest,
    WorkloadGuests,
    build,
)

ONLY_READS = {"write_every": 0, "unaligned_every": 0, "huge_every": 0}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("workload"))


@pytest.fixture
def guests(built: Path, tmp_path: Path) -> WorkloadGuests:
    return WorkloadGuests(built, tmp_path)


def kinds_of_errors(guest: WorkloadGuest) -> list[str]:
    return [report.values["kind"] for report in guest.reports("error")]


# Parameters ---------------------------------------------------------------------------------------


def test_a_workload_is_parsed_by_name() -> None:
    assert parse_workload("", 7) == Workload(seed=7)
    assert parse_workload("pattern=hot-set,threads=16,huge_every=0", 7) == Workload(
        seed=7, pattern="hot-set", threads=16, huge_every=0
    )
    assert parse_workload("seed=3", 7).seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patern=random", "unknown parameter 'patern'"),
        (
            "pattern=zigzag",
            "pattern=zigzag is unknown; expected one of random, sequential, hot-set",
        ),
        ("threads=many", "threads: expected a number, got 'many'"),
        ("threads=65", "threads=65 is out of range; expected 1 to 64"),
        ("max_pages=0", "max_pages=0 is out of range; expected 1 to 16"),
        ("threads", "threads: expected a number, got ''"),
    ],
)
def test_a_wrong_workload_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_workload(text, 1)


@pytest.mark.parametrize("text", ["thread=4", "threads=", "threads=4x", "pattern=randomly", ""])
def test_a_guest_refuses_unknown_parameters(guests: WorkloadGuests, text: str) -> None:
    assert not guests().library.read_parameter(text.encode())


def test_parameters_out_of_bounds_and_too_small_a_disk_are_refused(guests: WorkloadGuests) -> None:
    guest = guests()
    assert guest.problem is None
    guest.library.read_parameter(b"threads=0")
    assert b"out of bounds" in guest.library.prepare_workload(DISK_SECTORS)
    assert b"too small" in guest.library.prepare_workload(8)


# Planning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_guest_finds_no_error_on_a_correct_disk(guests: WorkloadGuests, pattern: str) -> None:
    guest = guests(pattern=pattern, write_once=512, huge_every=16, write_every=4, unaligned_every=4)
    worker = guest.worker()
    guest.run(worker, 200)
    guest.obey("o")
    requests = guest.run(worker, 600)
    guest.library.churn()
    guest.obey("s")
    assert guest.reports("error") == []
    assert {request.kind for request in requests} == {READ, WRITE, READ_BACK}
    assert {request.region for request in requests} == {OWN, HOT, ONCE}
    (recheck,) = guest.reports("recheck")
    # The guest checks every page that was read into: write-once, churn, and many hot pages.
    assert int(recheck.values["pages"]) > 512 + 4096 + 500


@pytest.mark.parametrize("pattern", PATTERNS)
def test_write_once_pages_are_used_once(guests: WorkloadGuests, pattern: str) -> None:
    guest = guests(pattern=pattern, hot=64, write_once=1000, churn=0, huge_every=8)
    worker = guest.worker()
    assert all(request.region != ONCE for request in guest.run(worker, 200))
    guest.obey("o")
    pages: Counter[int] = Counter()
    while not guest.reports("write-once-done"):
        (request,) = guest.run(worker, 1)
        if request.region == ONCE:
            pages.update(request.taken)
    first = 4 * OWN_PAGES + 64
    assert pages == Counter(range(first, first + 1000))
    assert [report.values for report in guest.reports("write-once-done")] == [{"pages": "1000"}]
    assert all(request.region != ONCE for request in guest.run(worker, 200))


def test_write_once_pages_are_used_once_in_each_migration(guests: WorkloadGuests) -> None:
    guest = guests(hot=64, write_once=256, churn=8)
    worker = guest.worker()
    for migration in (1, 2, 3):
        assert not any(request.region == ONCE for request in guest.run(worker, 50))
        guest.obey("o")
        once: list[int] = []
        while len(guest.reports("write-once-done")) < migration:
            once += [
                page
                for request in guest.run(worker, 10)
                if request.region == ONCE
                for page in request.taken
            ]
        assert len(once) == len(set(once)) == 256
        guest.obey("q")
        before = ctypes.c_uint64.from_address(guest.page(4 * OWN_PAGES + 64 + 256)).value
        guest.library.churn()
        assert ctypes.c_uint64.from_address(guest.page(4 * OWN_PAGES + 64 + 256)).value == before
        guest.obey("a")
        assert len(guest.reports("again")) == migration
        first_once = guest.page(4 * OWN_PAGES + 64)
        assert ctypes.string_at(first_once, 256 * PAGE_BYTES) == bytes(256 * PAGE_BYTES)
        guest.library.churn()
        assert ctypes.c_uint64.from_address(guest.page(4 * OWN_PAGES + 64 + 256)).value > before
        guest.obey("s")
    assert not guest.reports("error")


def test_a_guest_without_write_once_pages_is_done_at_once(guests: WorkloadGuests) -> None:
    guest = guests(write_once=0)
    guest.obey("o")
    guest.obey("o")
    assert len(guest.reports("write-once-done")) == 1


def test_requests_in_flight_share_no_page(guests: WorkloadGuests) -> None:
    guest = guests(
        threads=64, hot=256, write_once=512, write_every=4, unaligned_every=4, huge_every=32
    )
    guest.obey("o")
    workers = [guest.worker(number) for number in range(64)]
    for _ in range(20):
        under_way = [guest.plan(worker) for worker in workers]
        pages = Counter(page for request in under_way for page in request.taken)
        assert max(pages.values()) == 1
        blocks = [request.block for request in under_way if request.kind != READ]
        assert len(blocks) == len(set(blocks)) > 0
        for request in under_way:
            guest.serve(request)
            guest.finish(request)
    assert guest.reports("error") == []


def test_sequential_requests_continue_after_the_last_one(guests: WorkloadGuests) -> None:
    guest = guests(pattern="sequential", **ONLY_READS)
    requests = guest.run(guest.worker(), 100)
    for before, after in pairwise(requests):
        assert after.sector == before.sector + SECTORS_PER_PAGE * before.count
        assert after.taken[0] == before.taken[-1] + 1 or after.taken[0] == 4 * OWN_PAGES


@pytest.mark.parametrize(("pattern", "low", "high"), [("random", 0.0, 0.2), ("hot-set", 0.8, 1.0)])
def test_a_hot_set_gets_most_requests(
    guests: WorkloadGuests, pattern: str, low: float, high: float
) -> None:
    guest = guests(pattern=pattern, **ONLY_READS)
    requests = guest.run(guest.worker(), 2000)
    near = sum(request.sector < DISK_SECTORS / 16 for request in requests) / 2000
    assert low < near < high
    pages = Counter(page for request in requests for page in request.taken)
    first = 4 * OWN_PAGES
    hot = sum(count for page, count in pages.items() if page < first + 1024 / 16)
    assert low < hot / pages.total() < high


def test_a_huge_request_is_one_piece(guests: WorkloadGuests) -> None:
    guest = guests(
        hot=1024, write_once=2048, churn=0, huge_every=2, write_every=0, unaligned_every=0
    )
    guest.obey("o")
    requests = guest.run(guest.worker(), 60)
    huge = [request for request in requests if request.count == HUGE_PAGES]
    assert {request.region for request in huge} == {HOT, ONCE}
    for request in huge:
        jumps = [
            b - a for a, b in zip(request.taken, request.taken[1:], strict=False) if b - a != 1
        ]
        assert jumps in ([], [-1023])  # from the last hot page to the first


def test_an_unaligned_request_is_in_sectors_of_its_worker(guests: WorkloadGuests) -> None:
    guest = guests(unaligned_every=1, write_every=0)
    start = guest.page(3 * OWN_PAGES)
    offsets = set()
    for request in guest.run(guest.worker(3), 200):
        pieces = guest.pieces(request)
        assert pieces == [pieces[0] + 512 * index for index in range(8)]
        assert start <= pieces[0]
        assert pieces[-1] + 512 <= start + (OWN_PAGES - 1) * PAGE_BYTES
        offsets.add((pieces[0] - start) % PAGE_BYTES)
    assert all(offset % 8 == 0 for offset in offsets)
    assert sum(offset % 512 != 0 for offset in offsets) > 100
    assert guest.reports("error") == []


# Resets -------------------------------------------------------------------------------------------


def test_after_a_reboot_the_first_half_of_the_write_once_pages_is_left_out(
    guests: WorkloadGuests,
) -> None:
    before, after = (guests(hot=64, write_once=256, churn=0) for _ in range(2))
    used = []
    after.obey("h")
    for guest in (before, after):
        guest.obey("o")
        requests = guest.run(guest.worker(), 2000)
        used.append(
            [page for request in requests if request.region == ONCE for page in request.taken]
        )
    assert [len(pages) for pages in used] == [256, 128]
    assert used[0][128:] == used[1]
    (done,) = after.reports("write-once-done")
    assert done.values == {"pages": "128"}


def test_pages_of_a_repeated_request_are_no_write_once_pages(guests: WorkloadGuests) -> None:
    guest = guests(hot=64, write_once=256, churn=0, **ONLY_READS)
    worker = guest.worker()
    guest.obey("o")
    request = guest.plan(worker)
    while request.region != ONCE:
        request = guest.plan(worker)
    guest.serve(request)
    guest.library.repeat_request(ctypes.byref(request))
    guest.serve(request)
    guest.finish(request)
    guest.run(worker, 2000)
    (done,) = guest.reports("write-once-done")
    assert done.values == {"pages": str(256 - request.count)}
    assert guest.reports("error") == []


@pytest.mark.parametrize(
    ("command", "lines"), [("d", ["reset", "device-reset"]), ("u", ["reloaded", "driver-reloaded"])]
)
def test_a_device_is_reset_on_command(
    guests: WorkloadGuests, command: str, lines: list[str]
) -> None:
    guest = guests()
    guest.obey(command)
    assert guest.lines[-2:] == lines


# Checking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [0, 1, 2, 3, 255, 511])
def test_a_torn_page_is_found(guests: WorkloadGuests, word: int) -> None:
    guest = guests(**ONLY_READS)
    worker = guest.worker()
    guest.run(worker, 10)
    request = guest.plan(worker)

    def spoil(data: bytes) -> bytes:
        spoilt = bytearray(data)
        spoilt[8 * word] ^= 1
        return bytes(spoilt)

    guest.serve(request, spoil)
    guest.finish(request)
    (error,) = guest.reports("error")
    assert error.values["kind"] == "stamp"
    assert int(error.values["lba"]) == request.sector
    assert int(error.values["gpa"], 0) // PAGE_BYTES == request.taken[0]
    guest.obey("s")  # a page that is known to be wrong is not checked again
    assert len(guest.reports("error")) == 1


def test_a_stale_page_is_found(guests: WorkloadGuests) -> None:
    guest = guests(**ONLY_READS)
    worker = guest.worker()
    guest.run(worker, 10)
    request = guest.plan(worker)
    guest.served -= 1  # the next answer repeats a request number
    guest.serve(request)
    guest.finish(request)
    assert set(kinds_of_errors(guest)) == {"stale"}


def test_an_images_stamps_need_not_be_new(guests: WorkloadGuests) -> None:
    guest = guests(image=1, **ONLY_READS)
    worker = guest.worker()
    for _ in range(50):
        request = guest.plan(worker)
        guest.served = 0  # every answer has the same number
        guest.serve(request)
        guest.finish(request)
    assert guest.reports("error") == []
    elsewhere = stamped_page(request.sector + SECTORS_PER_PAGE, 1)
    ctypes.memmove(guest.pieces(request)[0], elsewhere, PAGE_BYTES)
    guest.obey("s")
    assert kinds_of_errors(guest) == ["recheck"]


def test_a_lost_write_is_found(guests: WorkloadGuests) -> None:
    guest = guests(write_every=1)
    worker = guest.worker()
    guest.run(worker, 300)
    assert guest.reports("error") == []
    before = dict(guest.written)
    guest.run(worker, 300)
    guest.written = before
    guest.run(worker, 300)
    assert set(kinds_of_errors(guest)) == {"writeback"}


def test_a_failed_request_is_reported(guests: WorkloadGuests) -> None:
    guest = guests(**ONLY_READS)
    request = guest.plan(guest.worker())
    guest.finish(request, 5)
    (error,) = guest.reports("error")
    assert error.values["kind"] == "io"
    assert int(error.values["found"], 0) == 5


@pytest.mark.parametrize("region", [OWN, HOT, ONCE])
def test_a_page_that_was_lost_in_ram_is_found(guests: WorkloadGuests, region: int) -> None:
    guest = guests(write_once=512, churn=0)
    worker = guest.worker()
    guest.obey("o")
    requests = [request for request in guest.run(worker, 500) if request.kind == READ]
    last = next(request for request in reversed(requests) if request.region == region)
    old = stamped_page(last.sector, 1)
    ctypes.memmove(guest.pieces(last)[0], old, last.piece_bytes)
    guest.obey("s")
    assert kinds_of_errors(guest) == ["recheck"]
    assert guest.reports("recheck")[0].values["errors"] == "1"


def test_a_churn_page_that_was_lost_is_found(guests: WorkloadGuests) -> None:
    guest = guests(churn=64)
    address = guest.page(4 * OWN_PAGES + 1024 + 8192 + 5)
    guest.library.churn()
    old = ctypes.string_at(address, 8)
    guest.library.churn()
    ctypes.memmove(address, old, 8)
    guest.obey("s")
    assert kinds_of_errors(guest) == ["churn"]


def test_quiet_stops_the_churn(guests: WorkloadGuests) -> None:
    guest = guests(churn=64)
    address = guest.page(4 * OWN_PAGES + 1024 + 8192)
    guest.library.churn()
    guest.obey("q")
    before = ctypes.string_at(address, 8)
    guest.library.churn()
    assert ctypes.string_at(address, 8) == before == (1).to_bytes(8, "little")
    assert len(guest.reports("quiet")) == 1


def test_the_runs_of_hold_pages_are_reported_before_ready(guests: WorkloadGuests) -> None:
    guest = guests(hold=1100)
    guest.library.report_ready()
    assert [report.values for report in guest.reports("hold")] == [
        {"gpa": "0x100000000", "pages": "512"},
        {"gpa": "0x100400000", "pages": "512"},
        {"gpa": "0x100800000", "pages": "76"},
    ]
    assert guest.lines.index("hold") < guest.lines.index("ready")


def test_a_guest_without_hold_pages_reports_none(guests: WorkloadGuests) -> None:
    guest = guests(hold=0)
    guest.library.report_ready()
    assert guest.reports("hold") == []


def test_the_guest_declares_the_pages_that_it_may_write_itself(guests: WorkloadGuests) -> None:
    guest = guests(threads=4, hot=1024, write_once=512, churn=64)
    guest.obey("w")
    first, second = (report.values for report in guest.reports("own"))
    assert first["gpa"] == "0", "an empty range must not be reported"
    end = int(second["gpa"], 16) // 4096
    assert end - int(first["pages"]) >= 1024 + 512, "only the device writes to these pages"
    assert int(second["pages"]) == 64
    assert guest.lines[-1].startswith("declared")


def test_the_guest_reports_its_parameters_and_progress(guests: WorkloadGuests) -> None:
    guest = guests(write_every=2, seed=9)
    guest.library.report_ready()
    (ready,) = guest.reports("ready")
    assert ready.values == {
        "threads": "4",
        "hot": "1024",
        "write_once": "8192",
        "churn": "4096",
        "seed": "9",
        "buffer_pages": str(1024 + 8192),
    }
    requests = guest.run(guest.worker(), 100)
    guest.library.report_progress()
    (progress,) = guest.reports("progress")
    writes = sum(request.kind == WRITE for request in requests)
    assert progress.values == {
        "requests": "100",
        "under_way": "3",
        "writes": str(writes),
        "write_once": "0",
        "errors": "0",
    }
