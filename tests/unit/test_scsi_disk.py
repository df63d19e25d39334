"""The SCSI disk of the tests' vhost-user-scsi target, command by command, without a transport."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from scsi_disk import (
    BLOCK_BYTES,
    ILLEGAL_REQUEST,
    INVALID_FIELD_IN_CDB,
    INVALID_OPERATION_CODE,
    LBA_OUT_OF_RANGE,
    LUN_NOT_SUPPORTED,
    MEDIUM_ERROR,
    NO_SENSE,
    SAVING_NOT_SUPPORTED,
    UNRECOVERED_READ_ERROR,
    WRITE_ERROR,
    CheckConditionError,
    OverrunError,
    ScsiDisk,
)

BLOCKS = 16
TEST_UNIT_READY, REQUEST_SENSE, INQUIRY, MODE_SENSE_6, READ_CAPACITY_10 = 0, 0x03, 0x12, 0x1A, 0x25
READ_10, WRITE_10, SYNCHRONIZE_CACHE_10, MODE_SENSE_10 = 0x28, 0x2A, 0x35, 0x5A
READ_16, WRITE_16, SYNCHRONIZE_CACHE_16, SERVICE_ACTION_IN_16 = 0x88, 0x8A, 0x91, 0x9E
REPORT_LUNS, UNMAP = 0xA0, 0x42


class Disk(ScsiDisk):
    """A disk of 16 blocks, each full of its own number."""

    def __init__(self, fd: int) -> None:
        os.pwrite(fd, b"".join(bytes([block]) * BLOCK_BYTES for block in range(BLOCKS)), 0)
        super().__init__(fd)

    def command(self, *cdb: int, lun: int = 0, data: bytes = b"") -> bytes:
        return self.execute(lun, bytes(cdb).ljust(32, b"\0"), data)

    def sense_of(self, *cdb: int, lun: int = 0, data: bytes = b"") -> tuple[int, int]:
        """Return the key and the code of the sense data with which a command fails."""
        with pytest.raises(CheckConditionError) as failed:
            self.command(*cdb, lun=lun, data=data)
        return parsed(failed.value.sense)


def parsed(sense: bytes) -> tuple[int, int]:
    """Return the key and the code of sense data, which must be in the fixed format."""
    assert len(sense) == 18
    assert (sense[0], sense[7]) == (0x70, len(sense) - 8)  # a current error; additional length
    return sense[2] & 0xF, int.from_bytes(sense[12:14])


def on_blocks(operation: int, first: int, count: int) -> tuple[int, ...]:
    """Return the CDB of a command that addresses blocks."""
    form = ">BxQI" if operation & 0x80 else ">BxIxH"
    return tuple(struct.pack(form, operation, first, count))


@pytest.fixture
def disk() -> Iterator[Disk]:
    fd = os.memfd_create("disk")
    yield Disk(fd)
    os.close(fd)


def test_a_disk_is_ready(disk: Disk) -> None:
    assert disk.command(TEST_UNIT_READY) == b""


def test_an_inquiry_describes_a_disk_up_to_the_allocation_length(disk: Disk) -> None:
    data = disk.command(INQUIRY, 0, 0, 0, 96)
    assert len(data) == data[4] + 5 == 36
    assert (data[0], data[3]) == (0, 2)  # a connected disk; the response format of SPC
    assert data[8:16] == b"dmaproof"
    assert disk.command(INQUIRY, 0, 0, 0, 5) == data[:5]


def test_the_page_list_has_just_the_pages_that_an_inquiry_returns(disk: Disk) -> None:
    def page(number: int) -> bytes:
        data = disk.command(INQUIRY, 1, number, 0, 255)
        assert data[1] == number
        assert len(data) == 4 + int.from_bytes(data[2:4])
        return data[4:]

    listed = page(0)
    for number in range(256):
        if number in listed:
            assert page(number)
        else:
            failure = disk.sense_of(INQUIRY, 1, number, 0, 255)
            assert failure == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
    assert disk.sense_of(INQUIRY, 0, 0x83, 0, 255) == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)


def test_the_capacities_are_those_of_the_file(disk: Disk) -> None:
    last, size = struct.unpack(">II", disk.command(READ_CAPACITY_10))
    assert (last, size) == (BLOCKS - 1, BLOCK_BYTES)
    data = disk.command(SERVICE_ACTION_IN_16, 0x10, *bytes(8), 0, 0, 0, 255)
    assert len(data) == 32
    assert struct.unpack_from(">QI", data) == (last, size)
    assert BLOCK_BYTES << (data[13] & 0xF) == 4096  # the physical block
    other = disk.sense_of(SERVICE_ACTION_IN_16, 0x12)
    assert other == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)


@pytest.mark.parametrize(("selected", "luns"), [(0, [0]), (1, []), (2, [0])])
def test_the_target_reports_its_only_unit(disk: Disk, selected: int, luns: list[int]) -> None:
    data = disk.command(REPORT_LUNS, 0, selected, 0, 0, 0, 0, 0, 0, 64)
    assert data == struct.pack(f">II{len(luns)}Q", 8 * len(luns), 0, *luns)


@pytest.mark.parametrize(("selected", "length"), [(3, 64), (0, 15)])
def test_an_invalid_report_of_units_is_refused(disk: Disk, selected: int, length: int) -> None:
    failure = disk.sense_of(REPORT_LUNS, 0, selected, 0, 0, 0, 0, 0, 0, length)
    assert failure == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)


@pytest.mark.parametrize("page", [0x08, 0x3F])
def test_the_mode_pages_say_that_the_write_cache_is_on(disk: Disk, page: int) -> None:
    short = disk.command(MODE_SENSE_6, 0, page, 0, 255)
    assert len(short) == short[0] + 1
    assert short[2:4] == bytes(2)  # writable, without block descriptors
    long = disk.command(MODE_SENSE_10, 0, page, 0, 0, 0, 0, 0, 255)
    assert len(long) == int.from_bytes(long[:2]) + 2
    assert short[4:] == long[8:]
    assert (short[4], len(short[4:])) == (0x08, short[5] + 2)
    assert short[6] == 0x04
    assert disk.command(MODE_SENSE_6, 0, 0x40 | page, 0, 255)[6] == 0  # nothing is changeable
    assert disk.command(MODE_SENSE_6, 0, page, 0, 4) == short[:4]


def test_mode_pages_that_the_disk_does_not_have_are_refused(disk: Disk) -> None:
    assert disk.sense_of(MODE_SENSE_6, 0, 0x0A, 0, 255) == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)
    saved = disk.sense_of(MODE_SENSE_10, 0, 0xC8, 0, 0, 0, 0, 0, 255)
    assert saved == (ILLEGAL_REQUEST, SAVING_NOT_SUPPORTED)


@pytest.mark.parametrize("read", [READ_10, READ_16])
def test_blocks_are_read_up_to_the_last(disk: Disk, read: int) -> None:
    assert disk.command(*on_blocks(read, 3, 2)) == b"\3" * BLOCK_BYTES + b"\4" * BLOCK_BYTES
    assert disk.command(*on_blocks(read, BLOCKS - 1, 1)) == bytes([BLOCKS - 1]) * BLOCK_BYTES
    assert disk.command(*on_blocks(read, BLOCKS, 0)) == b""


@pytest.mark.parametrize(("write", "read"), [(WRITE_10, READ_16), (WRITE_16, READ_10)])
def test_written_blocks_are_read_back_and_their_neighbours_stay(
    disk: Disk, write: int, read: int
) -> None:
    content = os.urandom(2 * BLOCK_BYTES)
    assert disk.command(*on_blocks(write, 5, 2), data=content + b"more than two blocks") == b""
    around = disk.command(*on_blocks(read, 4, 4))
    assert around == b"\4" * BLOCK_BYTES + content + b"\7" * BLOCK_BYTES


@pytest.mark.parametrize(
    "operation",
    [READ_10, WRITE_10, SYNCHRONIZE_CACHE_10, READ_16, WRITE_16, SYNCHRONIZE_CACHE_16],
)
@pytest.mark.parametrize(("first", "count"), [(BLOCKS, 1), (BLOCKS - 1, 2), (2**32 - 1, 1)])
def test_blocks_behind_the_last_are_out_of_range(
    disk: Disk, operation: int, first: int, count: int
) -> None:
    before = disk.command(*on_blocks(READ_10, 0, BLOCKS))
    failure = disk.sense_of(*on_blocks(operation, first, count), data=bytes(2 * BLOCK_BYTES))
    assert failure == (ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
    assert disk.command(*on_blocks(READ_10, 0, BLOCKS)) == before


@pytest.mark.parametrize("write", [WRITE_10, WRITE_16])
def test_a_write_with_too_little_data_writes_nothing(disk: Disk, write: int) -> None:
    with pytest.raises(OverrunError):
        disk.command(*on_blocks(write, 0, 2), data=b"\xff" * (2 * BLOCK_BYTES - 1))
    assert disk.command(*on_blocks(READ_10, 0, 1)) == bytes(BLOCK_BYTES)


@pytest.mark.parametrize("operation", [READ_10, WRITE_10, READ_16, WRITE_16])
@pytest.mark.parametrize("flag", [0x08, 0x10, 0x20])  # FUA, DPO, protection information
def test_flags_that_the_disk_does_not_offer_are_refused(
    disk: Disk, operation: int, flag: int
) -> None:
    cdb = on_blocks(operation, 0, 1)
    failure = disk.sense_of(cdb[0], flag, *cdb[2:], data=bytes(BLOCK_BYTES))
    assert failure == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)


def test_no_sense_data_is_pending(disk: Disk) -> None:
    assert parsed(disk.command(REQUEST_SENSE, 0, 0, 0, 252)) == (NO_SENSE, 0)
    assert len(disk.command(REQUEST_SENSE, 0, 0, 0, 8)) == 8
    assert disk.sense_of(REQUEST_SENSE, 1, 0, 0, 252) == (ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)


def test_any_other_command_is_an_illegal_request(disk: Disk) -> None:
    assert disk.sense_of(UNMAP) == (ILLEGAL_REQUEST, INVALID_OPERATION_CODE)
    assert disk.sense_of(0xFF) == (ILLEGAL_REQUEST, INVALID_OPERATION_CODE)


def test_a_unit_that_does_not_exist_answers_only_what_finds_it_missing(disk: Disk) -> None:
    assert disk.command(INQUIRY, 0, 0, 0, 36, lun=1)[0] == 0x7F
    missing = (ILLEGAL_REQUEST, LUN_NOT_SUPPORTED)
    assert parsed(disk.command(REQUEST_SENSE, 0, 0, 0, 18, lun=1)) == missing
    assert disk.command(REPORT_LUNS, *bytes(8), 64, lun=1) == struct.pack(">IIQ", 8, 0, 0)
    assert disk.sense_of(*on_blocks(READ_10, 0, 1), lun=1) == missing
    assert disk.sense_of(UNMAP, lun=1) == missing


def test_a_file_that_fails_is_a_medium_error(disk: Disk) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    disk._fd, intact = fd, disk._fd
    try:
        read = disk.sense_of(*on_blocks(READ_10, 0, 1))
        write = disk.sense_of(*on_blocks(WRITE_10, 0, 1), data=bytes(BLOCK_BYTES))
        flush = disk.sense_of(*on_blocks(SYNCHRONIZE_CACHE_10, 0, 0))
    finally:
        disk._fd = intact
        os.close(fd)
    assert read == (MEDIUM_ERROR, UNRECOVERED_READ_ERROR)
    assert write == flush == (MEDIUM_ERROR, WRITE_ERROR)


def test_a_flush_of_blocks_succeeds(disk: Disk) -> None:
    for operation in (SYNCHRONIZE_CACHE_10, SYNCHRONIZE_CACHE_16):
        assert disk.command(*on_blocks(operation, 0, BLOCKS)) == b""
