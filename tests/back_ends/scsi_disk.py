"""A SCSI disk on a file: what its logical unit answers to a command, without any transport.

The disk carries out the commands of SPC-4 and SBC-3 that Linux's sd driver and SeaBIOS need, and
answers every other command with CHECK CONDITION, ILLEGAL REQUEST. A write is in the file before its
command completes, so the target of a migration's source and that of its destination can share the
file. The disk offers no protection information, and neither the DPO nor the FUA bit.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final

BLOCK_BYTES: Final = 512
_BLOCKS_PER_PHYSICAL: Final = 3
"""The exponent of 2: the guest's pages are whole physical blocks."""

NO_SENSE, MEDIUM_ERROR, ILLEGAL_REQUEST = 0x0, 0x3, 0x5
WRITE_ERROR: Final = 0x0C00
UNRECOVERED_READ_ERROR: Final = 0x1100
INVALID_OPERATION_CODE: Final = 0x2000
LBA_OUT_OF_RANGE: Final = 0x2100
INVALID_FIELD_IN_CDB: Final = 0x2400
LUN_NOT_SUPPORTED: Final = 0x2500
SAVING_NOT_SUPPORTED: Final = 0x3900
"""Additional sense code and its qualifier (SPC-4, annex D)."""

_NO_SUCH_UNIT: Final = 0x7F
"""Peripheral qualifier 3, type 1Fh: the target has no logical unit at this LUN."""
_ALL_PAGES: Final = 0x3F
_CACHING: Final = 0x08
_SAVED_VALUES: Final = 3
_CHANGEABLE_VALUES: Final = 1
_WRITE_CACHE: Final = 0x04


class CheckConditionError(Exception):
    """The command ends with CHECK CONDITION; `code` is the additional sense code and qualifier."""

    def __init__(self, key: int, code: int) -> None:
        super().__init__(f"sense key {key:#x}, additional sense code {code:#06x}")
        self.sense = sense_data(key, code)


class OverrunError(Exception):
    """The command needs more data than the initiator has sent."""


def sense_data(key: int, code: int) -> bytes:
    """Return sense data in the fixed format, of a current error (SPC-4, section 4.5.3)."""
    return struct.pack(">BBB4xB4xH4x", 0x70, 0, key, 10, code)


class ScsiDisk:
    """The logical unit 0 of a target, with the blocks of the file `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.blocks = os.fstat(fd).st_size // BLOCK_BYTES

    def execute(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        """Carry out a command.

        Args:
            lun: the logical unit that the command addresses.
            cdb: the command descriptor block, at least 16 bytes long.
            data: what the initiator sends with the command.

        Returns:
            The data for the initiator, cut to the command's allocation length.

        Raises:
            CheckConditionError: the command fails.
            OverrunError: `data` is too short.
        """
        carry_out = _COMMANDS.get(cdb[0])
        if lun and cdb[0] not in _FOR_ANY_UNIT:
            raise CheckConditionError(ILLEGAL_REQUEST, LUN_NOT_SUPPORTED)
        if carry_out is None:
            raise CheckConditionError(ILLEGAL_REQUEST, INVALID_OPERATION_CODE)
        return carry_out(self, lun, cdb, data)

    def _test_unit_ready(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        return b""

    def _request_sense(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        """Every command reports its own sense data, so none is pending (SPC-4, section 6.39)."""
        _check(not cdb[1])  # bit 0 asks for the descriptor format
        sense = sense_data(*((ILLEGAL_REQUEST, LUN_NOT_SUPPORTED) if lun else (NO_SENSE, 0)))
        return sense[: cdb[4]]

    def _inquiry(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        page_wanted, page, length = struct.unpack_from(">BBH", cdb, 1)
        device = _NO_SUCH_UNIT if lun else 0
        if page_wanted:
            _check(page_wanted == 1 and page in _VITAL_PRODUCT_DATA and not lun)
            body = _VITAL_PRODUCT_DATA[page]
            return (struct.pack(">BBH", device, page, len(body)) + body)[:length]
        _check(not page)
        names = b"dmaproof".ljust(8) + b"SCSI disk".ljust(16) + b"1".ljust(4)
        # Version 6 is SPC-4; response format 2; CMDQUE: full task management.
        return (struct.pack(">BBBBBBBB", device, 0, 6, 2, 31, 0, 0, 2) + names)[:length]

    def _report_luns(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        selected, length = cdb[2], int.from_bytes(cdb[6:10])
        _check(selected <= 2 and length >= 16)
        luns = [] if selected == 1 else [0]  # 1: only the well-known logical units, and none exists
        return struct.pack(f">II{len(luns)}Q", 8 * len(luns), 0, *luns)[:length]

    def _mode_sense_6(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        pages = _mode_pages(cdb)
        return (struct.pack(">BBBB", 3 + len(pages), 0, 0, 0) + pages)[: cdb[4]]

    def _mode_sense_10(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        pages = _mode_pages(cdb)
        length = int.from_bytes(cdb[7:9])
        return (struct.pack(">HBBBBH", 6 + len(pages), 0, 0, 0, 0, 0) + pages)[:length]

    def _read_capacity_10(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        last = min(self.blocks - 1, 0xFFFFFFFF)  # a larger disk has only READ CAPACITY(16)
        return struct.pack(">II", last, BLOCK_BYTES)

    def _service_action_in(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        _check(cdb[1] & 0x1F == 0x10)  # READ CAPACITY(16)
        capacity = struct.pack(">QIBB18x", self.blocks - 1, BLOCK_BYTES, 0, _BLOCKS_PER_PHYSICAL)
        return capacity[: int.from_bytes(cdb[10:14])]

    def _extent(self, cdb: bytes) -> tuple[int, int]:
        """Return the offset and the length, in bytes, of the blocks that a command addresses."""
        first, count = struct.unpack_from(">QI" if cdb[0] & 0x80 else ">IxH", cdb, 2)
        if first > self.blocks or count > self.blocks - first:
            raise CheckConditionError(ILLEGAL_REQUEST, LBA_OUT_OF_RANGE)
        return first * BLOCK_BYTES, count * BLOCK_BYTES

    def _read(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        _check(not cdb[1])
        offset, length = self._extent(cdb)
        try:
            content = os.pread(self._fd, length, offset)
        except OSError:
            content = b""
        if len(content) != length:
            raise CheckConditionError(MEDIUM_ERROR, UNRECOVERED_READ_ERROR)
        return content

    def _write(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        _check(not cdb[1])
        offset, length = self._extent(cdb)
        if len(data) < length:
            raise OverrunError
        try:
            written = os.pwrite(self._fd, data[:length], offset)
        except OSError:
            written = 0
        if written != length:
            raise CheckConditionError(MEDIUM_ERROR, WRITE_ERROR)
        return b""

    def _synchronize_cache(self, lun: int, cdb: bytes, data: bytes) -> bytes:
        """Write all blocks to the medium, as the device may do whatever the extent is."""
        self._extent(cdb)
        try:
            os.fdatasync(self._fd)
        except OSError:
            raise CheckConditionError(MEDIUM_ERROR, WRITE_ERROR) from None
        return b""


def _check(fits: bool) -> None:
    if not fits:
        raise CheckConditionError(ILLEGAL_REQUEST, INVALID_FIELD_IN_CDB)


def _mode_pages(cdb: bytes) -> bytes:
    """Return the mode pages that MODE SENSE asks for: the caching page (SBC-3, section 6.5.6)."""
    control, page = cdb[2] >> 6, cdb[2] & 0x3F
    if control == _SAVED_VALUES:
        raise CheckConditionError(ILLEGAL_REQUEST, SAVING_NOT_SUPPORTED)
    _check(page in (_CACHING, _ALL_PAGES) and cdb[3] in (0, 0xFF))
    cache = 0 if control == _CHANGEABLE_VALUES else _WRITE_CACHE
    return struct.pack(">BBB17x", _CACHING, 18, cache)


_IDENTITY: Final = b"dmaproof" + b"disk"
_VITAL_PRODUCT_DATA: Final = {
    0x00: bytes((0x00, 0x83)),
    # A designator in ASCII, of the type 'T10 vendor ID', for the logical unit.
    0x83: struct.pack(">BBBB", 2, 1, 0, len(_IDENTITY)) + _IDENTITY,
}
"""The pages of INQUIRY that SPC-4 (section 7.8) requires."""

_Command = Callable[[ScsiDisk, int, bytes, bytes], bytes]
_INQUIRY, _REQUEST_SENSE, _REPORT_LUNS = 0x12, 0x03, 0xA0
_COMMANDS: Final[dict[int, _Command]] = {
    0x00: ScsiDisk._test_unit_ready,
    _REQUEST_SENSE: ScsiDisk._request_sense,
    _INQUIRY: ScsiDisk._inquiry,
    0x1A: ScsiDisk._mode_sense_6,
    0x25: ScsiDisk._read_capacity_10,
    0x28: ScsiDisk._read,
    0x2A: ScsiDisk._write,
    0x35: ScsiDisk._synchronize_cache,
    0x5A: ScsiDisk._mode_sense_10,
    0x88: ScsiDisk._read,
    0x8A: ScsiDisk._write,
    0x91: ScsiDisk._synchronize_cache,
    0x9E: ScsiDisk._service_action_in,
    _REPORT_LUNS: ScsiDisk._report_luns,
}
_FOR_ANY_UNIT: Final = frozenset({_INQUIRY, _REQUEST_SENSE, _REPORT_LUNS})
"""The commands that a target answers for a logical unit that does not exist (SPC-4, 5.9)."""
