"""The block device, request by request: its limits, and data beside written sectors."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmaproof.devices.blk import Blk
from dmaproof.dma import Dma
from dmaproof.errors import ProtocolError, UsageError
from dmaproof.stamp import SECTOR_BYTES, read_stamp, stamped_page
from dmaproof.virtqueue import DescriptorChain, Segment
from qmp_tools.testbed.ring_driver import PAGE, guest_memory, ram_fd
from support.host_pages import HOST_PAGE
from support.rings import dma_for

RAM_BYTES = 64 * PAGE
HEADER, STATUS, DATA = PAGE, 2 * PAGE, 8 * PAGE
PAGES = 16
SECTORS = 8 * PAGES
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR = 0, 1


class Disk:
    """A disk of 16 pages in memory, and the RAM of the guest that uses it."""

    def __init__(self, fd: int, device: Blk | None = None) -> None:
        self.device = device or Blk(PAGES * PAGE)
        self.dma: Dma = dma_for(guest_memory(fd, (0, RAM_BYTES, 0)))
        self.written = 0

    def put(self, gpa: int, data: bytes) -> None:
        self.dma.memory.view(gpa, len(data))[:] = data

    def get(self, gpa: int, length: int) -> bytes:
        return bytes(self.dma.memory.view(gpa, length))

    def carry_out(self, readable: list[Segment], writable: list[Segment]) -> None:
        self.written = self.device.process(
            DescriptorChain(0, 1, readable=readable, writable=writable), self.dma
        )

    def request(self, kind: int, sector: int, *data: Segment) -> int:
        """Carry out one request in the usual form, and return its status."""
        self.put(HEADER, struct.pack("<IIQ", kind, 0, sector))
        self.put(STATUS, b"\xff")
        readable, writable = [Segment(HEADER, 16)], [Segment(STATUS, 1)]
        if kind == OUT:
            readable += data
        else:
            writable[:0] = data
        self.carry_out(readable, writable)
        return self.get(STATUS, 1)[0]

    def read(self, sector: int, sectors: int) -> bytes:
        assert self.request(IN, sector, Segment(DATA, sectors * SECTOR_BYTES)) == OK
        assert self.written == sectors * SECTOR_BYTES + 1
        return self.get(DATA, sectors * SECTOR_BYTES)

    def write(self, sector: int, content: bytes) -> None:
        self.put(DATA, content)
        assert self.request(OUT, sector, Segment(DATA, len(content))) == OK
        assert self.written == 1


@pytest.fixture(params=[1, 3], ids=["", "large blocks"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk whose file seems to be in a file system with blocks of one page, or of several."""
    fstat, lseek = os.fstat, os.lseek
    block: int = request.param * HOST_PAGE

    def seek(fd: int, position: int, whence: int) -> int:
        data = lseek(fd, position - position % block, whence)
        return max(position, data - data % block)

    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result(fstat(fd), {"st_blksize": block}))
    monkeypatch.setattr(os, "lseek", seek)
    with ram_fd(RAM_BYTES) as fd:
        yield Disk(fd)


# Edges ------------------------------------------------------------------------------------------


def test_the_last_sector_can_be_written_and_read(disk: Disk) -> None:
    content = os.urandom(SECTOR_BYTES)
    disk.write(SECTORS - 1, content)
    assert disk.read(SECTORS - 1, 1) == content
    assert disk.read(SECTORS - 2, 2)[SECTOR_BYTES:] == content


def test_the_last_page_can_be_read_unwritten(disk: Disk) -> None:
    assert read_stamp(disk.read(SECTORS - 8, 8)) == (SECTORS - 8, 1)


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(("sector", "sectors"), [(SECTORS - 1, 2), (SECTORS, 1), (0, SECTORS + 1)])
def test_a_request_beyond_the_last_sector_has_no_effect(
    disk: Disk, kind: int, sector: int, sectors: int
) -> None:
    assert disk.request(kind, sector, *[Segment(DATA, SECTOR_BYTES)] * sectors) == IOERR
    assert disk.written == 1
    assert disk.get(DATA, SECTOR_BYTES) == bytes(SECTOR_BYTES)
    assert read_stamp(disk.read(SECTORS - 8, 8)) == (SECTORS - 8, 2)


def test_the_largest_disk_serves_its_last_sector() -> None:
    largest = (1 << 63) - PAGE
    with ram_fd(RAM_BYTES) as fd:
        disk = Disk(fd, Blk(largest))
        assert disk.request(IN, largest // SECTOR_BYTES - 1, Segment(DATA, SECTOR_BYTES)) == OK
        assert disk.request(IN, largest // SECTOR_BYTES, Segment(DATA, SECTOR_BYTES)) == IOERR


@pytest.mark.parametrize("kind", [IN, OUT])
def test_the_largest_request(kind: int) -> None:
    most = (32 << 20) // SECTOR_BYTES
    with ram_fd(RAM_BYTES) as fd:
        disk = Disk(fd, Blk(64 << 20))
        data = [Segment(DATA, PAGE)] * (most // 8)
        assert disk.request(kind, 0, *data) == OK
        assert disk.request(kind, 0, *data, Segment(DATA, SECTOR_BYTES)) == IOERR


@pytest.mark.parametrize("length", [1, SECTOR_BYTES - 1, SECTOR_BYTES + 1])
def test_data_of_partial_sectors_is_refused(disk: Disk, length: int) -> None:
    for kind in (IN, OUT):
        assert disk.request(kind, 0, Segment(DATA, length)) == IOERR


@pytest.mark.parametrize("capacity_bytes", [0, -PAGE, PAGE - 1, PAGE + SECTOR_BYTES])
def test_a_disk_of_partial_pages_is_refused(capacity_bytes: int) -> None:
    with pytest.raises(UsageError, match="expected a multiple of 4096 bytes"):
        Blk(capacity_bytes)


def test_a_disk_of_one_page() -> None:
    with ram_fd(RAM_BYTES) as fd:
        assert read_stamp(Disk(fd, Blk(PAGE)).read(0, 8)) == (0, 1)


# Data beside written sectors --------------------------------------------------------------------


@pytest.mark.parametrize("sector", [16, 20, 23])
def test_sectors_beside_a_written_one_keep_their_stamp(disk: Disk, sector: int) -> None:
    content = os.urandom(SECTOR_BYTES)
    disk.write(sector, content)
    whole = bytearray(stamped_page(16, 1))
    start = (sector - 16) * SECTOR_BYTES
    whole[start : start + SECTOR_BYTES] = content
    assert disk.read(16, 8) == whole


def test_pages_beside_a_written_one_get_a_new_stamp(disk: Disk) -> None:
    disk.write(16, os.urandom(PAGE))
    assert read_stamp(disk.read(8, 8)) == (8, 2)
    assert read_stamp(disk.read(24, 8)) == (24, 3)
    assert read_stamp(disk.read(16, 8)) is None


def test_a_write_across_pages_keeps_the_rest_of_both_pages(disk: Disk) -> None:
    content = os.urandom(PAGE + 2 * SECTOR_BYTES)
    disk.write(7, content)
    whole = bytearray(b"".join(stamped_page(lba, 1) for lba in (0, 8, 16)))
    whole[7 * SECTOR_BYTES : 17 * SECTOR_BYTES] = content
    assert disk.read(0, 24) == whole
    assert disk.read(7, 10) == content


def test_a_read_inside_a_page_returns_that_part_of_its_stamp(disk: Disk) -> None:
    assert disk.read(11, 7) == (stamped_page(8, 1) + stamped_page(16, 1))[1536 : 1536 + 7 * 512]


def test_a_second_write_keeps_the_rest_of_the_first(disk: Disk) -> None:
    first, second = os.urandom(PAGE), os.urandom(SECTOR_BYTES)
    disk.write(8, first)
    disk.write(9, second)
    assert disk.read(8, 8) == first[:SECTOR_BYTES] + second + first[2 * SECTOR_BYTES :]


# A request's form -------------------------------------------------------------------------------


def test_header_data_and_status_may_share_segments(disk: Disk) -> None:
    content = os.urandom(SECTOR_BYTES)
    disk.put(DATA, struct.pack("<IIQ", OUT, 0, 3) + content)
    disk.carry_out([Segment(DATA, 5), Segment(DATA + 5, 11 + SECTOR_BYTES)], [Segment(STATUS, 1)])
    assert disk.written == 1
    assert disk.read(3, 1) == content

    disk.put(HEADER, struct.pack("<IIQ", IN, 0, 3))
    disk.put(DATA, b"\xee" * (2 * SECTOR_BYTES))
    disk.carry_out([Segment(HEADER, 16)], [Segment(DATA, SECTOR_BYTES + 1)])
    assert disk.get(DATA, SECTOR_BYTES + 2) == content + bytes((OK, 0xEE))
    assert disk.written == SECTOR_BYTES + 1


@pytest.mark.parametrize(("readable", "writable"), [(15, 1), (16, 0)])
def test_a_request_that_is_too_short_is_refused(disk: Disk, readable: int, writable: int) -> None:
    with pytest.raises(ProtocolError, match=f"got {readable} readable and {writable} writable"):
        disk.carry_out([Segment(HEADER, readable)], [Segment(STATUS, writable)])


@pytest.mark.parametrize(("room", "length"), [(0, 0), (8, 8), (19, 19), (20, 20), (30, 20)])
def test_the_device_id_is_cut_to_the_buffer(disk: Disk, room: int, length: int) -> None:
    disk.put(DATA, b"\xee" * 40)
    assert disk.request(GET_ID, 0, Segment(DATA, room)) == OK
    assert disk.get(DATA, 31) == (b"dmaproof".ljust(20, b"\0")[:length]).ljust(31, b"\xee")
    assert disk.written == length + 1


def test_the_device_id_leaves_further_segments_unchanged(disk: Disk) -> None:
    disk.put(DATA + PAGE, b"\xee" * 10)
    assert disk.request(GET_ID, 0, Segment(DATA, 20), Segment(DATA + PAGE, 10)) == OK
    assert disk.get(DATA + PAGE, 10) == b"\xee" * 10
    assert disk.written == 21


def test_each_request_has_the_next_number(disk: Disk) -> None:
    disk.dma.journal.start()
    for number in (1, 2):
        disk.read(0, 8)
        assert disk.device.requests == number
    assert disk.dma.journal.records()["request"].tolist() == [1, 1, 2, 2]
    assert disk.dma.journal.records()["kind"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("queues", [3, 0xFFFF])
def test_the_configuration_has_the_layout_of_the_specification(queues: int) -> None:
    config = Blk(PAGES * PAGE, queues=queues).config()
    expected = bytearray(36)
    struct.pack_into("<Q", expected, 0, SECTORS)
    struct.pack_into("<I", expected, 12, 126)  # seg_max
    struct.pack_into("<I", expected, 20, SECTOR_BYTES)  # blk_size
    struct.pack_into("<H", expected, 34, queues)  # num_queues
    assert config == expected


def test_a_disk_serves_16_queues_by_default() -> None:
    device = Blk(PAGE)
    assert device.queues == 16
    assert device.config()[34:] == struct.pack("<H", 16)


def test_the_arguments_for_qemu_name_the_socket_and_the_queues() -> None:
    assert Blk.qemu_arguments("socket0", 3, ["iommu_platform=on", "id=disk"]) == [
        "-device",
        "vhost-user-blk-pci,chardev=socket0,num-queues=3,queue-size=128,iommu_platform=on,id=disk",
    ]


# The file ---------------------------------------------------------------------------------------


def test_other_users_may_not_read_or_write_a_new_disk(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Blk(PAGE, file=tmp_path / "disk")
    finally:
        os.umask(before)
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o600


def test_a_deleted_disk_closes_its_file(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    device = Blk(PAGE, file=file)
    assert open_descriptors(file) == 1
    del device
    gc.collect()
    assert open_descriptors(file) == 0


def open_descriptors(file: Path) -> int:
    """Return the number of this process's file descriptors of `file`."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own file descriptor is closed
            found += link.readlink() == file
    return found


def test_a_partly_written_page_fails_the_request(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: len(data) - 1)
    assert disk.request(OUT, 0, Segment(DATA, PAGE)) == IOERR


def test_a_file_that_cannot_be_read_fails_the_request(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(os, "lseek", fail)
    for kind in (IN, OUT):
        assert disk.request(kind, 0, Segment(DATA, PAGE)) == IOERR
        assert disk.written == 1, "only the status byte is written"


def test_a_page_in_three_segments_changes_nothing_else(disk: Disk) -> None:
    pieces = [Segment(DATA, 100), Segment(DATA + PAGE, 200), Segment(DATA + 2 * PAGE, PAGE - 300)]
    assert disk.request(IN, 0, *pieces) == OK
    assert read_stamp(b"".join(disk.get(*piece) for piece in pieces)) == (0, 1)
    assert disk.written == PAGE + 1
    for kind, status in ((FLUSH, OK), (99, 2)):
        assert disk.request(kind, 0) == status
        assert disk.written == 1
