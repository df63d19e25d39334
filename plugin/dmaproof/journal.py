"""The ground truth: every DMA write that a device made while dirty logging was on.

The journal never feeds the log. The verdict compares the chain with the journal: for each lost page
the journal says which request wrote it, when, and in which *epoch*, the number of the harvest that
had to report the write.
"""

from __future__ import annotations

import struct
import time
import zlib
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray


class WriteKind(IntEnum):
    """What a device wrote."""

    DATA = 0
    """Data of a request."""
    STATUS = 1
    """The status byte of a request."""
    USED_RING = 2
    """The part of a ring that the device writes."""


RECORD: Final = np.dtype(
    [
        ("time_ns", "<u8"),
        ("request", "<u8"),
        ("iova", "<u8"),
        ("gpa", "<u8"),
        ("epoch", "<u8"),
        ("length", "<u4"),
        ("checksum", "<u4"),
        ("kind", "<u4"),
        ("queue", "<u4"),
    ]
)
"""The record of one write: `time_ns` of CLOCK_MONOTONIC, `length` in bytes, `checksum` the CRC-32
of the data. A write that spans two memory slots has two records."""

_PACK = struct.Struct("<QQQQQIIII").pack
assert struct.calcsize("<QQQQQIIII") == RECORD.itemsize


class Journal:
    """The record of a device's writes from `start` to `stop`; other writes are only counted.

    The device's queue handler sets the attributes `request` and `queue` before it writes, to the
    numbers of the request and the queue for which it writes.

    Args:
        file: the file to which each record is written immediately, so that the records outlive the
            process. None keeps the records in memory only.

    Example:
        >>> journal = Journal()
        >>> journal.start()
        >>> journal.write(WriteKind.DATA, iova=0x1000, gpa=0x1000, data=b"new", epoch=1)
        >>> [int(record["length"]) for record in journal.records()]
        [3]
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file.open("ab", buffering=0) if file else None
        self.request = 0
        """The number of the request for which the device writes; 0 for none."""
        self.queue = 0
        """The number of the queue for which the device writes."""
        self.writes = 0
        """The number of all writes, recorded or not."""
        self.bytes_written = 0
        """The number of bytes of all writes, recorded or not."""
        self.started_ns: int | None = None
        """The time of `start` in nanoseconds of CLOCK_MONOTONIC; None before it."""
        self._recording = False
        self._records = bytearray()

    @property
    def recording(self) -> bool:
        """Whether writes are being recorded."""
        return self._recording

    def start(self) -> None:
        """Drop earlier records and start recording."""
        self._records = bytearray()
        if self._file is not None:
            self._file.truncate(0)
        self.started_ns = time.monotonic_ns()
        self._recording = True

    def resume(self, started_ns: int) -> None:
        """Continue after the records in the file, of a recording that began at `started_ns`."""
        assert self._file is not None
        whole = Path(self._file.name).read_bytes()
        whole = whole[: len(whole) // RECORD.itemsize * RECORD.itemsize]
        self._file.truncate(len(whole))  # the last record may be incomplete
        self._records = bytearray(whole)
        self.started_ns = started_ns
        self._recording = True

    def stop(self) -> None:
        """Stop recording. The records stay readable."""
        self._recording = False

    def write(
        self, kind: WriteKind, iova: int, gpa: int, data: bytes | memoryview, epoch: int
    ) -> None:
        """Record a write whose data is already in RAM.

        Args:
            kind: the kind of data.
            iova: the IOVA of the first byte.
            gpa: the guest-physical address of the first byte.
            data: the bytes written.
            epoch: the number of the harvest that has to report the write.
        """
        self.writes += 1
        self.bytes_written += len(data)
        if self._recording:
            record = _PACK(
                time.monotonic_ns(),
                self.request,
                iova,
                gpa,
                epoch,
                len(data),
                zlib.crc32(data),
                kind,
                self.queue,
            )
            self._records += record
            if self._file is not None:
                self._file.write(record)

    def records(self) -> NDArray[np.void]:
        """Return a copy of the records.

        Returns:
            A structured array of shape (writes,), in the order of the writes, with the fields
            `time_ns` (of CLOCK_MONOTONIC), `request`, `iova`, `gpa`, `epoch`, `length` (in bytes),
            `checksum` (the CRC-32 of the data), `kind` and `queue`.
        """
        return np.frombuffer(bytes(self._records), dtype=RECORD)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
