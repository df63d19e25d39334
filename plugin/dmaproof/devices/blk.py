"""A virtio block device (virtio 1.2, section 5.2) whose every read is unique.

Sectors that were never written read as stamped pages (see `dmaproof.stamp`): LBA, request number
and checksum in each 4 KiB page, so that no two reads bring the same bytes. Sectors that the guest
wrote read back as they were written, like any disk's; they are kept in memory.
"""

from __future__ import annotations

import struct
from typing import ClassVar, Final

from ..dma import Dma
from ..errors import ProtocolError
from ..journal import WriteKind
from ..stamp import PAGE_BYTES, SECTOR_BYTES, SECTORS_PER_PAGE, stamped_page
from ..virtqueue import DescriptorChain, Segment

_F_SEG_MAX: Final = 1 << 2
_F_BLK_SIZE: Final = 1 << 6
_F_FLUSH: Final = 1 << 9
_F_MQ: Final = 1 << 12

T_IN, _T_OUT, _T_FLUSH, _T_GET_ID = 0, 1, 4, 8
_S_OK, _S_IOERR, _S_UNSUPP = 0, 1, 2

_ID_BYTES: Final = 20
_MAX_REQUEST_BYTES: Final = 32 << 20
"""Larger requests get an I/O error: a driver must not decide how much memory the process takes."""
_SEG_MAX: Final = 126
"""A queue of 128 holds this many data segments between the request's header and its status."""


class Blk:
    """A disk of `capacity_bytes` (a multiple of 4096) served by up to `queues` virtqueues."""

    name: ClassVar[str] = "blk"
    features = _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH | _F_MQ

    def __init__(self, capacity_bytes: int = 64 << 30, queues: int = 16) -> None:
        if capacity_bytes <= 0 or capacity_bytes % PAGE_BYTES:
            raise ValueError(f"capacity of {capacity_bytes} bytes is no multiple of {PAGE_BYTES}")
        self.queues = queues
        self.requests = 0
        self._sectors = capacity_bytes // SECTOR_BYTES
        self._written: dict[int, bytearray] = {}
        """Page number on the disk → its content, for pages with a sector that was written."""

    def config(self) -> bytes:
        """See `VirtioDevice.config`; struct virtio_blk_config, section 5.2.4."""
        return struct.pack(
            "<QIIHBBI BBHI BBH",
            self._sectors,
            0,  # size_max: not offered
            _SEG_MAX,
            *(0, 0, 0),  # geometry: not offered
            SECTOR_BYTES,
            *(0, 0, 0, 0),  # topology: not offered
            *(0, 0),  # writeback: not offered, and a byte unused
            self.queues,
        )

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """See `VirtioDevice.process`; struct virtio_blk_req, section 5.2.6."""
        self.requests += 1
        dma.journal.request = self.requests
        header = b"".join(dma.read(*segment) for segment in _take(chain.readable, 0, 16))
        writable = sum(length for _, length in chain.writable)
        if len(header) < 16 or writable < 1:
            raise ProtocolError(
                f"block request {self.requests}: {len(header)} of 16 header bytes readable and "
                f"{writable} bytes writable; a status byte is needed"
            )
        kind, _, sector = struct.unpack("<IIQ", header)
        payload = _take(chain.writable, 0, writable - 1)
        status_iova = _take(chain.writable, writable - 1, 1)[0].iova

        if kind == T_IN:
            status, written = self._read(sector, payload, writable - 1, dma)
        elif kind == _T_OUT:
            status, written = self._write(sector, _take(chain.readable, 16, None), dma), 0
        elif kind == _T_FLUSH:
            status, written = _S_OK, 0
        elif kind == _T_GET_ID:
            identity = b"dmaproof".ljust(_ID_BYTES, b"\0")[: writable - 1]
            written = _scatter(identity, payload, dma)
            status = _S_OK
        else:
            status, written = _S_UNSUPP, 0
        dma.write(status_iova, bytes((status,)), WriteKind.STATUS)
        return written + 1

    def _refused(self, sector: int, length: int) -> bool:
        return (
            length % SECTOR_BYTES != 0
            or length > _MAX_REQUEST_BYTES
            or sector + length // SECTOR_BYTES > self._sectors
        )

    def _read(self, sector: int, payload: list[Segment], length: int, dma: Dma) -> tuple[int, int]:
        if self._refused(sector, length):
            return _S_IOERR, 0
        first, skipped = divmod(sector, SECTORS_PER_PAGE)
        last = -(-(sector + length // SECTOR_BYTES) // SECTORS_PER_PAGE)
        data = b"".join(self._page(page) for page in range(first, last))
        start = skipped * SECTOR_BYTES
        return _S_OK, _scatter(memoryview(data)[start : start + length], payload, dma)

    def _page(self, page: int) -> bytes | bytearray:
        written = self._written.get(page)
        if written is None:
            return stamped_page(page * SECTORS_PER_PAGE, self.requests)
        return written

    def _write(self, sector: int, payload: list[Segment], dma: Dma) -> int:
        if self._refused(sector, sum(length for _, length in payload)):
            return _S_IOERR
        data = b"".join(dma.read(*segment) for segment in payload)
        position = 0
        while position < len(data):
            page, start = divmod(sector * SECTOR_BYTES + position, PAGE_BYTES)
            size = min(PAGE_BYTES - start, len(data) - position)
            content = bytearray(self._page(page))
            content[start : start + size] = data[position : position + size]
            self._written[page] = content
            position += size
        return _S_OK


def _take(segments: list[Segment], start: int, length: int | None) -> list[Segment]:
    """The pieces that hold `length` bytes (None: all the rest) from byte `start` of `segments`."""
    end = sum(size for _, size in segments) if length is None else start + length
    pieces: list[Segment] = []
    position = 0
    for iova, size in segments:
        low, high = max(start, position), min(end, position + size)
        if low < high:
            pieces.append(Segment(iova + low - position, high - low))
        position += size
    return pieces


def _scatter(data: bytes | memoryview, segments: list[Segment], dma: Dma) -> int:
    position = 0
    for iova, length in segments:
        piece = data[position : position + length]
        if not piece:
            break
        dma.write(iova, piece)
        position += len(piece)
    return position
