"""Digests of pages of 4 KiB in a file with holes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent
from dmaproof.units import PAGE_BYTES
from qmp_tools.memory.absent_pages import Absent
from qmp_tools.memory.data_runs import DataRuns
from qmp_tools.memory.pages import FilePages, SavedPages, differing_pages
from qmp_tools.testbed.ring_driver import ram_fd
from support.host_pages import HOST_PAGE

PAGES = 600
"""More than are read at once."""


NOTHING = Absent(np.zeros(PAGES, dtype=np.bool_))


def pages_of(fd: int, first: int = 0, count: int = PAGES) -> FilePages:
    return FilePages(Extent(fd, first * PAGE_BYTES), count, DataRuns(fd), lambda: NOTHING)


@pytest.fixture
def fd() -> Iterator[int]:
    with ram_fd(PAGES * PAGE_BYTES) as opened:
        yield opened


def test_a_digest_is_the_canonical_xxh3_of_the_page(fd: int) -> None:
    content = {page: os.urandom(PAGE_BYTES) for page in (0, 255, 256, 257, PAGES - 1)}
    for page, data in content.items():
        os.pwrite(fd, data, page * PAGE_BYTES)
    digests = pages_of(fd).digests()
    assert (digests.shape, digests.dtype) == ((PAGES, 2), np.dtype("<u8"))
    for page in range(PAGES):
        expected = xxhash.xxh3_128_digest(content[page]) if page in content else bytes(16)
        assert digests[page].tobytes() == expected, page


def test_a_written_page_of_zeros_has_the_digest_of_a_hole(fd: int) -> None:
    os.pwrite(fd, bytes(3 * PAGE_BYTES), 5 * PAGE_BYTES)
    os.pwrite(fd, b"\1", 6 * PAGE_BYTES + PAGE_BYTES - 1)
    digests = pages_of(fd, 4, 5).digests()
    assert digests.any(axis=1).tolist() == [False, False, True, False, False]


def test_holes_are_not_filled(fd: int) -> None:
    os.pwrite(fd, b"x", 300 * PAGE_BYTES)
    pages_of(fd).digests()
    assert os.fstat(fd).st_blocks * 512 == HOST_PAGE


def test_a_file_that_has_shrunk_is_an_error(fd: int) -> None:
    for page in range(4):
        os.pwrite(fd, b"x", page * PAGE_BYTES)
    os.ftruncate(fd, 3 * PAGE_BYTES + 1)
    with pytest.raises(UntestableError, match="ends at byte 12289: it has shrunk"):
        pages_of(fd, 0, 4).digests()


def test_every_changed_page_differs_from_its_digest(fd: int) -> None:
    for page in range(0, PAGES, 3):
        os.pwrite(fd, os.urandom(PAGE_BYTES), page * PAGE_BYTES)
    readable = pages_of(fd)
    saved = SavedPages(PAGES, readable.digests(), NOTHING, lambda page: None)
    for sides in ((readable, saved), (saved, readable), (saved, saved)):
        assert differing_pages(*sides).tolist() == []
    changed = [0, 4, PAGES - 1]
    for page in changed:
        os.pwrite(fd, b"\xff", page * PAGE_BYTES + 77)
    for sides in ((readable, saved), (saved, readable)):
        assert differing_pages(*sides).tolist() == changed


def test_pages_of_zeros_are_known_from_the_content_and_from_the_digests(fd: int) -> None:
    os.pwrite(fd, b"x", 2 * PAGE_BYTES + 5)
    readable = pages_of(fd)
    saved = SavedPages(PAGES, readable.digests(), NOTHING, lambda page: None)
    for pages in (readable, saved):
        assert pages.are_zero(np.array([1, 2, 3])).tolist() == [True, False, True]
        assert pages.are_zero(np.array([], dtype=np.int64)).tolist() == []


@pytest.fixture
def large_fd() -> Iterator[int]:
    """A file of pages of the host, which are what is a hole or data."""
    with ram_fd(PAGES * HOST_PAGE) as opened:
        yield opened


def test_each_run_of_data_is_sought_once(large_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SEEK_HOLE walks through all data up to the next hole, however little of it is asked for."""
    for first, last in ((2, 300), (310, 500)):
        for page in range(first, last):
            os.pwrite(large_fd, b"x", page * HOST_PAGE)
    sought: list[int] = []

    def lseek(fd: int, position: int, whence: int) -> int:
        sought.append(whence)
        return seek(fd, position, whence)

    seek = os.lseek
    monkeypatch.setattr(os, "lseek", lseek)
    runs = DataRuns(large_fd)
    found = [
        (start // HOST_PAGE, end // HOST_PAGE)
        for first in range(0, PAGES, 100)
        for start, end in runs.within(first * HOST_PAGE, (first + 100) * HOST_PAGE)
    ]
    data = [(2, 100), (100, 200), (200, 300), (310, 400), (400, 500)]
    assert found == data
    assert sought.count(os.SEEK_HOLE) == 2


@pytest.mark.parametrize("pieces", [1, 7, 64, 600])
def test_runs_within_pieces_are_those_of_the_whole(large_fd: int, pieces: int) -> None:
    pages = {0, 1, 5, 63, 64, 65, 128, 599}
    for page in pages:
        os.pwrite(large_fd, b"x", page * HOST_PAGE)
    runs = DataRuns(large_fd)
    for first in [*range(0, PAGES, pieces), 64, 0]:
        end = min(first + pieces, PAGES)
        found = {
            page
            for start, stop in runs.within(first * HOST_PAGE, end * HOST_PAGE)
            for page in range(start // HOST_PAGE, stop // HOST_PAGE)
        }
        assert found == pages & set(range(first, end))
