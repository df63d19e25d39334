"""Shared memory in a process; this process serves as an example, with mappings of every kind."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.memory.process_memory import Mapping, mappings_of, parse_maps, shared_memory
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.host_pages import HOST_PAGE

LENGTH = 4 * HOST_PAGE


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def test_the_lines_of_proc_maps_become_mappings() -> None:
    lines = [
        "7f00-8f00 rw-s 00001000 00:01 1701                       /memfd:a b (deleted)\n",
        "8f00-9f00 rw-p 00000000 00:00 0 \n",
    ]
    assert parse_maps(lines) == [
        Mapping(0x7F00, 0x8F00, True, 0x1000, 1701, "/memfd:a b (deleted)"),
        Mapping(0x8F00, 0x9F00, False, 0, 0, ""),
    ]


def test_a_memfd_is_found_by_its_host_address() -> None:
    with ram_fd(2 * LENGTH) as fd, mmap.mmap(fd, LENGTH, offset=LENGTH) as mapping:
        os.pwrite(fd, b"here", LENGTH + PAGE)
        mappings, hva = mappings_of(os.getpid(), "me"), address_of(mapping) + PAGE
        with shared_memory(os.getpid(), mappings, hva, PAGE) as memory:
            assert memory is not None
            assert (memory.offset, memory.inode) == (LENGTH + PAGE, os.fstat(fd).st_ino)
            assert os.pread(memory.fd, 4, memory.offset) == b"here"


def test_a_file_that_is_closed_is_found_by_its_mapping() -> None:
    with ram_fd(LENGTH) as fd:
        mapping = mmap.mmap(fd, LENGTH)
    with mapping:
        mapping[:4] = b"here"
        mappings = mappings_of(os.getpid(), "me")
        with shared_memory(os.getpid(), mappings, address_of(mapping), LENGTH) as memory:
            if memory is None and os.geteuid():
                pytest.skip("/proc/PID/map_files is for root: run the tests as root")
            assert memory is not None
            assert os.pread(memory.fd, 4, memory.offset) == b"here"


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS])
def test_private_memory_has_no_shared_file(flags: int) -> None:
    with ram_fd(LENGTH) as fd:
        number = -1 if flags & mmap.MAP_ANONYMOUS else fd
        with mmap.mmap(number, LENGTH, flags=flags) as mapping:
            mappings = mappings_of(os.getpid(), "me")
            with shared_memory(os.getpid(), mappings, address_of(mapping), LENGTH) as memory:
                assert memory is None


def test_a_file_of_huge_pages_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file cannot be mapped at the offsets at which a guest's regions begin."""
    with ram_fd(LENGTH) as fd, mmap.mmap(fd, LENGTH) as mapping:
        usual = os.fstatvfs(fd)
        huge = os.statvfs_result((2 << 20, *usual[1:]))
        monkeypatch.setattr(os, "fstatvfs", lambda fd: huge)
        mappings = mappings_of(os.getpid(), "me")
        with shared_memory(os.getpid(), mappings, address_of(mapping), LENGTH) as memory:
            assert memory is not None
            assert memory.page_bytes == 2 << 20


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"offset": 0}, False),
        ({"inode": 1}, False),
        ({"shared": False}, False),
        ({"start": 0x3000, "end": 0x4000}, False),
    ],
)
def test_the_pieces_of_a_split_mapping_must_be_one_file_in_order(
    changes: dict[str, Any], found: bool
) -> None:
    """Memory policies split a backend's mapping."""
    with ram_fd(LENGTH) as fd:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        first = Mapping(0x1000, 0x2000, True, 0, os.fstat(fd).st_ino, path)
        second = replace(first, start=0x2000, end=0x3000, offset=0x1000)
        mappings = [first, replace(second, **changes)]
        with shared_memory(os.getpid(), mappings, 0x1000, 0x2000) as memory:
            assert (memory is not None) == found


def test_a_process_that_does_not_exist_is_reported() -> None:
    gone = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(UntestableError, match="source QEMU"):
        mappings_of(gone, "source QEMU")


@pytest.mark.parametrize(
    "line",
    ["", "7f0000000000", "x-y rw-s 0 00:01 5", "1000-2000 rw 0 00:01 5", "1000 rw-s 0 00:01 5 /a"],
)
def test_a_malformed_line_of_proc_maps_is_refused(line: str) -> None:
    with pytest.raises(UntestableError, match="a line in an unknown format"):
        parse_maps([line])
