"""Memory whose file is truncated: the access continues, and only that mapping is marked lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dmaproof._mapping import SharedMapping
from qmp_tools.testbed.ring_driver import ram_fd
from support.host_pages import HOST_PAGE as PAGE


@pytest.fixture
def fd() -> Iterator[int]:
    with ram_fd(16 * PAGE) as ram:
        yield ram


def test_a_mapping_shows_its_part_of_the_file(fd: int) -> None:
    os.pwrite(fd, b"here", 3 * PAGE + 100)
    view = memoryview(SharedMapping(fd, 2 * PAGE, 3 * PAGE + 100))
    assert len(view) == 2 * PAGE
    assert bytes(view[:4]) == b"here"
    view[-1] = 7
    assert os.pread(fd, 1, 5 * PAGE + 99) == b"\7"


def test_memory_of_a_truncated_file_reads_as_zeros(fd: int) -> None:
    mapping, other = SharedMapping(fd, 4 * PAGE, 0), SharedMapping(fd, 2 * PAGE, 0)
    view = memoryview(mapping)
    view[0] = view[3 * PAGE] = 1
    os.ftruncate(fd, 3 * PAGE)
    assert view[0] == 1
    assert not mapping.lost, "no missing byte was accessed"
    assert view[3 * PAGE] == 0
    view[3 * PAGE] = 5  # private memory now
    assert mapping.lost
    assert not other.lost
    assert memoryview(other)[0] == 1
    os.ftruncate(fd, 16 * PAGE)
    assert os.pread(fd, 1, 3 * PAGE) == b"\0"


def test_c_loops_in_several_threads_survive_a_truncated_file(fd: int) -> None:
    mapping = SharedMapping(fd, 16 * PAGE, 0)
    data = np.frombuffer(memoryview(mapping), dtype=np.uint8)
    os.ftruncate(fd, 0)
    threads = [threading.Thread(target=data.sum) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mapping.lost
    assert not data.any()


def test_the_memory_is_unmapped_with_its_last_view(fd: int) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:guest-ram")

    view = memoryview(SharedMapping(fd, PAGE, 0))[10:]
    assert mapped() == 1
    del view
    assert mapped() == 0
    for _ in range(2000):  # more than can exist at a time
        SharedMapping(fd, PAGE, 0)
    assert mapped() == 0


def test_more_mappings_than_the_limit_are_refused(fd: int) -> None:
    held = [SharedMapping(fd, PAGE, 0) for _ in range(1000)]
    with pytest.raises(OSError, match="Cannot allocate memory"):
        held += [SharedMapping(fd, PAGE, 0) for _ in range(1000)]
    held.clear()
    SharedMapping(fd, PAGE, 0)


@pytest.mark.parametrize(("length", "offset"), [(0, 0), (-1, 0), (PAGE, -PAGE)])
def test_lengths_and_offsets_that_are_not_positive_are_refused(
    fd: int, length: int, offset: int
) -> None:
    with pytest.raises(ValueError, match="expected a length > 0"):
        SharedMapping(fd, length, offset)


def test_a_read_only_file_cannot_be_mapped(fd: int) -> None:
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        SharedMapping(reader, PAGE, 0)
    os.close(reader)
