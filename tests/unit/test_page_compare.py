"""The comparison of two extents with holes and data, at any offset of a memory backend."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmaproof.page_compare import Extent, differing_pages, page_digests
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.host_pages import SIZES, host_pages

PAGES = 12
CONTENTS = st.lists(st.sampled_from([None, 0, 1, 2]), min_size=PAGES, max_size=PAGES)
"""For each page, None for a hole or the byte with which the page is filled."""


def fill(fd: int, offset: int, contents: list[int | None]) -> None:
    for page, byte in enumerate(contents):
        if byte is not None:
            os.pwrite(fd, bytes([byte]) * PAGE, offset + page * PAGE)


@given(CONTENTS, CONTENTS, st.integers(0, 3), st.integers(0, 3), st.sampled_from(SIZES))
def test_pages_with_different_bytes_differ(
    left: list[int | None],
    right: list[int | None],
    left_start: int,
    right_start: int,
    host_page_bytes: int,
) -> None:
    """Single pages of 4 KiB, whatever the size of the host's pages."""
    with (
        ram_fd((PAGES + 8) * PAGE) as source,
        ram_fd((PAGES + 8) * PAGE) as destination,
        host_pages(host_page_bytes),
    ):
        # Data before and after the extents must have no effect.
        fill(source, 0, [3] * left_start)
        fill(destination, (right_start + PAGES) * PAGE, [4])
        fill(source, left_start * PAGE, left)
        fill(destination, right_start * PAGE, right)
        found = differing_pages(
            Extent(source, left_start * PAGE),
            Extent(destination, right_start * PAGE),
            PAGES * PAGE,
            PAGE,
        )
    expected = [page for page in range(PAGES) if (left[page] or 0) != (right[page] or 0)]
    assert found.tolist() == expected


@pytest.fixture
def hole_searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The file descriptors of the searches for the end of a run of data."""
    searched = []
    lseek = os.lseek

    def search(fd: int, position: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            searched.append(fd)
        return lseek(fd, position, whence)

    monkeypatch.setattr(os, "lseek", search)
    return searched


def test_the_end_of_a_run_of_data_is_sought_once(hole_searches: list[int]) -> None:
    """A search at each piece would take a time that grows with the square of the RAM's size."""
    length = 4 << 20
    with ram_fd(length) as source, ram_fd(length) as destination:
        os.pwrite(source, bytes(length), 0)
        for run in range(8):
            os.pwrite(destination, bytes(PAGE), 2 * run * mmap.PAGESIZE)
        assert not differing_pages(Extent(source), Extent(destination), length).size
        assert hole_searches.count(source) == 1
        assert hole_searches.count(destination) == 8
        assert not page_digests(Extent(source), length).any()
        assert hole_searches.count(source) == 2


@pytest.mark.parametrize(
    ("offset", "length", "page_size"), [(512, PAGE, PAGE), (0, PAGE + 1, PAGE), (0, PAGE, 512)]
)
def test_partial_pages_are_refused(offset: int, length: int, page_size: int) -> None:
    with ram_fd(4 * PAGE) as fd, pytest.raises(ValueError, match="page"):
        differing_pages(Extent(fd, offset), Extent(fd), length, page_size)


@given(CONTENTS, st.integers(0, 3), st.sampled_from(SIZES), st.data())
def test_the_digest_of_a_page_changes_with_its_content(
    contents: list[int | None], start: int, host_page_bytes: int, data: st.DataObject
) -> None:
    with ram_fd((PAGES + 8) * PAGE) as fd, host_pages(host_page_bytes):
        extent = Extent(fd, start * PAGE)
        fill(fd, start * PAGE, contents)
        before = page_digests(extent, PAGES * PAGE, PAGE)
        assert [bool(digest) for digest in before] == [bool(byte) for byte in contents]
        changed = data.draw(st.sets(st.integers(0, PAGES - 1)))
        for page in changed:
            place = (start + page) * PAGE + data.draw(st.integers(0, PAGE - 1))
            os.pwrite(
                fd, bytes([os.pread(fd, 1, place)[0] ^ 1 << data.draw(st.integers(0, 7))]), place
            )
        os.pwrite(fd, b"x", (start + PAGES) * PAGE)  # after the extent
        after = page_digests(extent, PAGES * PAGE, PAGE)
        assert set(np.flatnonzero(before != after)) == changed


def test_the_top_bits_of_an_even_number_of_words_change_the_digest() -> None:
    with ram_fd(PAGE) as fd:
        before = page_digests(Extent(fd), PAGE, PAGE)
        for word in (3, 400):
            os.pwrite(fd, b"\x80", word * 8 + 7)
        assert page_digests(Extent(fd), PAGE, PAGE) != before
