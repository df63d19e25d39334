"""Copies of a guest's RAM."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from dmaproof.errors import UntestableError
from dmaproof.units import PAGE_BYTES
from qmp_tools.memory.ram import RamFile, compare, copied
from qmp_tools.testbed.ring_driver import ram_fd

PAGES = 600  # more than are copied at once, and no multiple of that


def ram(fd: int) -> RamFile:
    status = os.fstat(fd)
    return RamFile(fd, status.st_size, status.st_dev, status.st_ino)


def test_a_copy_does_not_change_with_the_ram() -> None:
    with ram_fd(PAGES * PAGE_BYTES) as fd:
        for page in (0, 299, PAGES - 1):
            os.pwrite(fd, b"then", page * PAGE_BYTES)
        with copied([ram(fd)]) as (moment,):
            assert len(compare(moment, ram(fd))) == 0
            assert (moment.device, moment.inode) == (ram(fd).device, ram(fd).inode)
            os.pwrite(fd, b"now", 299 * PAGE_BYTES)
            os.pwrite(fd, b"now", 300 * PAGE_BYTES)
            assert compare(moment, ram(fd)).tolist() == [299, 300]
            copy = moment.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(copy)


def test_pages_that_were_never_written_take_no_memory() -> None:
    with ram_fd(PAGES * PAGE_BYTES) as fd, copied([ram(fd)]) as (moment,):
        assert os.fstat(moment.fd).st_blocks == 0
        assert len(compare(moment, ram(fd))) == 0


def test_memory_that_cannot_be_read_is_reported() -> None:
    with ram_fd(PAGE_BYTES) as fd:
        gone = replace(ram(fd), fd=-1)
    with pytest.raises(UntestableError, match="cannot copy the guest's RAM"), copied([gone]):
        pass
