"""QEMU's log: its valid sizes and offsets, and that no bit is set outside it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from dmaproof.dirty_log import BufferDirtyLog, VhostDirtyLog, log_bytes_needed
from dmaproof.errors import BitmapError, ProtocolError
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

ALL = np.full(8, (1 << 64) - 1, dtype=np.uint64)


@pytest.fixture
def fd() -> Iterator[int]:
    with ram_fd(PAGE) as file:
        yield file


@pytest.mark.parametrize(
    ("pages", "needed"), [(0, 0), (1, 8), (64, 8), (65, 16), (128, 16), (1 << 20, 1 << 17)]
)
def test_the_size_of_a_log_is_rounded_up_to_whole_words(pages: int, needed: int) -> None:
    assert log_bytes_needed(pages * PAGE) == needed
    assert log_bytes_needed(pages * PAGE - 1 if pages else 0) == needed


@pytest.mark.parametrize(
    ("gpa", "pages"), [(0, 129), (128 * PAGE, 1), (127 * PAGE, 2), (1 << 63, 1), (512, 1)]
)
def test_pages_outside_the_log_are_refused_and_no_bit_is_set(gpa: int, pages: int) -> None:
    memory = bytearray(24)
    log = BufferDirtyLog(memoryview(memory)[:16])
    with pytest.raises(BitmapError, match="misaligned or reach beyond the log's end"):
        log.merge(gpa, ALL, 0, pages)
    assert memory == bytes(24)
    log.merge(0, ALL, 0, 128)
    assert memory == b"\xff" * 16 + bytes(8)


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (12, 0), (8, 4), (8, PAGE), (PAGE + 8, 0), (1 << 63, 0)]
)
def test_a_log_of_partial_words_or_outside_its_file_is_refused(
    fd: int, size: int, offset: int
) -> None:
    with pytest.raises(BitmapError, match="expected whole 64-bit words"):
        VhostDirtyLog(fd, size, offset)


def test_a_log_may_begin_anywhere_in_its_file(fd: int) -> None:
    log = VhostDirtyLog(fd, 16, 3000)
    log.merge(64 * PAGE, ALL, 3, 2)
    log.close()
    assert os.pread(fd, PAGE, 0) == bytes(3008) + b"\3" + bytes(PAGE - 3009)


def test_a_log_may_end_where_its_file_ends(fd: int) -> None:
    log = VhostDirtyLog(fd, 16, PAGE - 16)
    log.merge(127 * PAGE, ALL, 0, 1)
    log.close()
    assert os.pread(fd, PAGE, 0) == bytes(PAGE - 1) + b"\x80"
    whole = VhostDirtyLog(fd, PAGE, 0)
    assert len(whole.memory) == PAGE
    whole.close()


def test_the_size_of_a_log_is_exact_beyond_the_precision_of_a_float() -> None:
    assert log_bytes_needed((1 << 63) + PAGE) == (1 << 48) + 8


def test_merging_keeps_the_bits_of_the_log(fd: int) -> None:
    log = BufferDirtyLog(bytearray(b"\x01" + bytes(15)))
    log.merge(62 * PAGE, np.array([0b1011 << 2], dtype=np.uint64), 2, 4)
    assert int.from_bytes(log.memory, "little") == 1 | 0b1011 << 62


def test_a_truncated_log_is_reported(fd: int) -> None:
    log = VhostDirtyLog(fd, 16, 0)
    os.ftruncate(fd, 0)
    with pytest.raises(ProtocolError, match="truncated while it was in use"):
        log.merge(0, ALL, 0, 1)
    log.close()
