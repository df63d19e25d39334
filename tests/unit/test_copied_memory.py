"""Copies of memory that only a process has mapped, with this process as an example."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host.process_status import has_thread, user_and_group
from qmp_tools.memory.absent_pages import PRESENT, Absent
from qmp_tools.memory.copied_memory import ProcessMemory, process_memory
from qmp_tools.memory.pages import ProcessPages
from qmp_tools.memory.process_memory import Mapping, mappings_of
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.host_pages import HOST_PAGE, PER_PAGE, host_pages


@pytest.fixture
def private() -> Iterator[mmap.mmap]:
    """Four pages of the host in private memory; the second is never touched."""
    with mmap.mmap(-1, 4 * HOST_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping[:3] = b"one"
        mapping[2 * HOST_PAGE : 2 * HOST_PAGE + 5] = b"three"
        yield mapping


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def test_private_memory_is_copied_and_the_next_copy_overwrites_it(private: mmap.mmap) -> None:
    with process_memory(os.getpid(), "me", mappings_of(os.getpid(), "me")) as memory:
        assert memory is not None
        hva = address_of(private)
        assert memory.has(hva, 4 * HOST_PAGE)
        fd, offset = memory.copy(hva, 3 * HOST_PAGE)
        assert os.pread(fd, 3 * HOST_PAGE, offset) == private[: 3 * HOST_PAGE]
        fd, offset = memory.copy(hva + 2 * HOST_PAGE, PAGE)
        assert os.pread(fd, 5, offset) == b"three"


def test_only_pages_with_content_are_read(private: mmap.mmap) -> None:
    """The kernel maps adjacent anonymous memory together, so the runs begin anywhere in it."""
    private.madvise(mmap.MADV_NOHUGEPAGE)
    hva = address_of(private)
    with process_memory(os.getpid(), "me", mappings_of(os.getpid(), "me")) as memory:
        assert memory is not None
        runs = [(0, HOST_PAGE), (2 * HOST_PAGE, 3 * HOST_PAGE)]
        assert list(memory.data_runs(hva, 4 * HOST_PAGE)) == runs
        assert list(memory.data_runs(hva + HOST_PAGE, HOST_PAGE)) == []
        assert list(memory.data_runs(hva + 2 * HOST_PAGE, 2 * HOST_PAGE)) == [(0, HOST_PAGE)]
        count = 4 * PER_PAGE
        pages = ProcessPages(memory, hva, count, lambda: Absent(np.zeros(count, dtype=np.bool_)))
        assert np.flatnonzero(pages.digests().any(axis=1)).tolist() == [0, 2 * PER_PAGE]
        assert pages.content(2 * PER_PAGE)[:5] == b"three"


def test_runs_of_content_may_begin_and_end_in_a_page_of_the_host(
    private: mmap.mmap, tmp_path: Path
) -> None:
    words = (0, int(PRESENT), int(PRESENT), 0)
    (tmp_path / "pagemap").write_bytes(b"".join(word.to_bytes(8, "little") for word in words))
    mappings = [Mapping(0, 64 * PAGE, False, 0, 0, "")]
    with (tmp_path / "pagemap").open("rb") as file, host_pages(16 * PAGE):
        memory = ProcessMemory("me", mappings, -1, file.fileno(), -1, private)
        for first, pages, runs in (
            (0, 64, [(16, 48)]),
            (15, 2, [(1, 2)]),
            (20, 3, [(0, 3)]),
            (40, 20, [(0, 8)]),
            (50, 5, []),
        ):
            found = memory.data_runs(first * PAGE, pages * PAGE)
            assert list(found) == [(begin * PAGE, end * PAGE) for begin, end in runs]


def test_all_pages_of_a_private_file_are_read() -> None:
    with ram_fd(4 * PAGE) as fd:
        os.pwrite(fd, b"file", PAGE)
        with mmap.mmap(fd, 4 * PAGE, flags=mmap.MAP_PRIVATE) as mapping:
            mapping[3 * PAGE : 3 * PAGE + 4] = b"mine"
            hva = address_of(mapping)
            with process_memory(os.getpid(), "me", mappings_of(os.getpid(), "me")) as memory:
                assert memory is not None
                assert list(memory.data_runs(hva, 4 * PAGE)) == [(0, 4 * PAGE)]
                pages = ProcessPages(memory, hva, 4, lambda: Absent(np.zeros(4, dtype=np.bool_)))
                assert pages.digests().any(axis=1).tolist() == [False, True, False, True]


def test_memory_that_is_not_mapped_cannot_be_copied(private: mmap.mmap) -> None:
    hva = address_of(private)
    with process_memory(os.getpid(), "me", mappings_of(os.getpid(), "me")) as memory:
        assert memory is not None
        assert not memory.has(0, PAGE)
        with pytest.raises(
            UntestableError, match=r"cannot read the memory of me at host address 0x1000:"
        ):
            memory.copy(0x1000, PAGE)
    with process_memory(os.getpid(), "me", [Mapping(hva, hva + PAGE, False, 0, 0, "")]) as memory:
        assert memory is not None
        assert memory.has(hva, PAGE)
        assert not memory.has(hva, 2 * PAGE)


def test_an_error_while_copying_is_not_replaced_by_another() -> None:
    def copy() -> None:
        with process_memory(os.getpid(), "me", []) as memory:
            assert memory is not None
            memory.copy(0x1000, PAGE)

    with pytest.raises(UntestableError, match=r"^cannot read the memory of me"):
        copy()


@pytest.mark.parametrize(("second", "found"), [(0x2000, True), (0x3000, False)])
def test_memory_in_several_mappings_must_be_contiguous(
    private: mmap.mmap, second: int, found: bool
) -> None:
    mappings = [Mapping(start, start + 0x1000, False, 0, 0, "") for start in (0x1000, second)]
    memory = ProcessMemory("me", mappings, -1, -1, -1, private)
    assert memory.has(0x1000, 0x2000) == found


def test_a_process_that_may_not_be_read_has_no_memory_to_copy() -> None:
    gone = int(Path("/proc/sys/kernel/pid_max").read_text())
    with process_memory(gone, "it", []) as memory:
        assert memory is None


def test_the_user_the_group_and_the_threads_of_a_process_are_known() -> None:
    assert user_and_group(os.getpid()) == (os.geteuid(), os.getegid())
    assert has_thread(os.getpid(), os.getpid())
    assert not has_thread(os.getpid(), os.getppid())
