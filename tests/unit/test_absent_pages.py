"""Absent pages of memory, found by the kernel's reports about each page."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from qmp_tools.memory.absent_pages import (
    PRESENT,
    absent_in_file,
    absent_in_process,
    pagemap_entries,
)
from qmp_tools.memory.data_runs import DataRuns
from qmp_tools.memory.process_memory import Mapping, mappings_of
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.host_pages import HOST_PAGE, IS_ALONE, PER_PAGE, host_pages, of_each

ME = os.getpid()


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@pytest.fixture
def private() -> mmap.mmap:
    """Four pages of the host, private and not huge, each full of its own number from 1 on."""
    memory = mmap.mmap(-1, 4 * HOST_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = b"".join(bytes([page]) * HOST_PAGE for page in range(1, 5))
    return memory


def absent_among(memory: mmap.mmap, first: int, pages: int, **places: Path) -> list[bool]:
    hva = address_of(memory) + first * HOST_PAGE
    found = absent_in_process(ME, mappings_of(ME, "me"), hva, pages * PER_PAGE, **places)
    return of_each(found.absent)


def test_absent_pages_are_counted_from_the_address(private: mmap.mmap) -> None:
    private.madvise(mmap.MADV_DONTNEED, 2 * HOST_PAGE, HOST_PAGE)
    assert absent_among(private, 0, 4) == [False, False, True, False]
    assert absent_among(private, 2, 2) == [True, False]


def test_memory_before_or_after_a_mapping_decides_nothing(private: mmap.mmap) -> None:
    hva = address_of(private)
    private.madvise(mmap.MADV_DONTNEED)
    mapping = Mapping(hva + PAGE, hva + 3 * PAGE, False, 0, 0, "")  # fewer than there really are
    for first, pages in ((0, 2), (2, 2), (0, 4)):
        found = absent_in_process(ME, [mapping], hva + first * PAGE, pages)
        assert (found.absent.tolist(), found.certain) == ([False] * pages, False)


@pytest.mark.parametrize(
    ("word", "merged", "absent"),
    [
        (0, "0", True),
        (0, "1", True),
        (1 << 63, "0", True),  # the zero page, which others have mapped too
        (1 << 63 | 1 << 56, "0", False),
        (1 << 63, "1", False),  # or it is one that KSM has merged
        (1 << 63 | 1 << 61 | 1 << 56, "0", True),  # a page of a file
        (1 << 62, "0", False),
        (1 << 62 | 1 << 61, "0", False),
        (1 << 61, "0", True),
        (1 << 63, None, True),
    ],
)
def test_a_page_is_absent_by_its_pagemap_entry_and_ksm(
    private: mmap.mmap,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    word: int,
    merged: str | None,
    absent: bool,
) -> None:
    ksm = tmp_path / "kernel/mm/ksm"
    ksm.mkdir(parents=True)
    if merged is not None:
        (ksm / "pages_sharing").write_text(f"{merged}\n")
    monkeypatch.setattr(os, "pread", lambda *_: word.to_bytes(8, "little"))
    assert absent_among(private, 0, 1, sysfs=tmp_path) == [absent]


@pytest.mark.parametrize("merged", [False, True])
def test_it_is_uncertain_whether_the_zero_page_is_absent_if_ksm_merges_pages(
    private: mmap.mmap, tmp_path: Path, *, merged: bool
) -> None:
    """A comparison of two running QEMUs reads all pages, and the kernel maps the zero page then."""
    ksm = tmp_path / "kernel/mm/ksm"
    ksm.mkdir(parents=True)
    (ksm / "pages_sharing").write_text(f"{int(merged)}\n")
    private.madvise(mmap.MADV_DONTNEED)
    address = address_of(private)
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        os.pread(memory.fileno(), mmap.PAGESIZE, address)
    found = absent_in_process(ME, mappings_of(ME, "me"), address, 1, sysfs=tmp_path)
    assert (found.absent.tolist(), found.certain) == ([not merged], not merged and IS_ALONE)


def test_a_short_read_of_the_pagemap_decides_nothing(
    private: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: bytes(4))
    found = absent_in_process(ME, mappings_of(ME, "me"), address_of(private), 2)
    assert (found.absent.tolist(), found.certain) == ([False, False], False)


def smaps(start: int, end: int, **values: int) -> str:
    lines = [f"{start:x}-{end:x} rw-p 00000000 00:00 0"]
    return "\n".join([*lines, *(f"{key}: {value} kB" for key, value in values.items()), ""])


FLAGS = "VmFlags: rd wr\n"


@pytest.mark.parametrize(
    ("before", "own", "behind", "certain"),
    [
        ({}, {"AnonHugePages": 0, "Private_Hugetlb": 0}, {}, True),
        ({}, {"AnonHugePages": 2048}, {}, False),
        ({}, {"Private_Hugetlb": 2048}, {}, False),
        ({}, {"Rss": 4}, {}, True),
        ({}, {"Rss": 4, "AnonHugePages": 2048}, {}, False),
        ({"AnonHugePages": 2048}, {"AnonHugePages": 0}, {"AnonHugePages": 2048}, True),
        ({"AnonHugePages": 0}, None, {"AnonHugePages": 0}, False),
    ],
)
def test_only_huge_pages_in_the_same_mapping_make_absence_uncertain(
    private: mmap.mmap,
    tmp_path: Path,
    before: dict[str, int],
    own: dict[str, int] | None,
    behind: dict[str, int],
    certain: bool,
) -> None:
    hva = address_of(private)
    mapping = Mapping(hva, hva + 4 * PAGE, False, 0, 0, "")
    text = smaps(PAGE, 2 * PAGE, **before) + FLAGS
    if own is not None:
        text += smaps(mapping.start, mapping.end, **own) + FLAGS
    process = tmp_path / str(ME)
    process.mkdir()
    (process / "smaps").write_text(text + smaps(1 << 47, 1 << 48, **behind) + FLAGS)
    (process / "pagemap").symlink_to("/proc/self/pagemap")
    found = absent_in_process(ME, [mapping], hva, 4, proc=tmp_path)
    assert found.certain == (certain and IS_ALONE)


def test_data_outside_the_queried_pages_does_not_count() -> None:
    def absent(first: int, pages: int) -> list[bool]:
        return of_each(absent_in_file(DataRuns(fd), first * HOST_PAGE, pages * PER_PAGE).absent)

    with ram_fd(8 * HOST_PAGE) as fd:
        for page in (0, 4):
            os.pwrite(fd, b"data", page * HOST_PAGE)
        assert absent(1, 3) == [True] * 3
        assert absent(1, 4) == [True] * 3 + [False]
        os.pwrite(fd, b"data", 5 * HOST_PAGE)
        assert absent(3, 2) == [True, False]
        assert absent(4, 1) == [False]


LARGE = 16 * PAGE
"""A page of a host with pages of 64 KiB."""
EXCLUSIVE = 1 << 56


def test_pages_in_one_page_of_the_host_have_its_entry(tmp_path: Path) -> None:
    (tmp_path / "pagemap").write_bytes(b"".join(n.to_bytes(8, "little") for n in range(8)))
    with (tmp_path / "pagemap").open("rb") as file, host_pages(LARGE):
        for first, pages in ((0, 16), (3, 2), (15, 2), (17, 40)):
            entries = pagemap_entries(file.fileno(), first * PAGE, pages)
            assert entries is not None
            assert entries.tolist() == [page // 16 for page in range(first, first + pages)]
        assert pagemap_entries(file.fileno(), 120 * PAGE, 8) is not None
        assert pagemap_entries(file.fileno(), 120 * PAGE, 9) is None


def test_in_larger_pages_of_the_host_it_is_uncertain_which_pages_were_discarded(
    tmp_path: Path,
) -> None:
    mapping = Mapping(0, 4 * LARGE, False, 0, 0, "")
    process = tmp_path / str(ME)
    process.mkdir()
    (process / "smaps").write_text(smaps(mapping.start, mapping.end, Rss=64) + FLAGS)
    words = (0, int(PRESENT) | EXCLUSIVE, 0, 0)
    (process / "pagemap").write_bytes(b"".join(word.to_bytes(8, "little") for word in words))
    with host_pages(LARGE), ram_fd(4 * LARGE) as fd:
        found = absent_in_process(ME, [mapping], 14 * PAGE, 20, proc=tmp_path, sysfs=tmp_path)
        assert found.absent.tolist() == [True] * 2 + [False] * 16 + [True] * 2
        assert not found.certain
        os.pwrite(fd, bytes(LARGE), LARGE)
        in_file = absent_in_file(DataRuns(fd), 14 * PAGE, 20)
        assert in_file.absent.tolist() == found.absent.tolist()
        assert not in_file.certain
