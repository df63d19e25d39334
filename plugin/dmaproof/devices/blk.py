"""A virtio block device (virtio 1.2, section 5.2) that returns unique data for every read.

Sectors that were never written read as stamped pages (see `dmaproof.stamp`): each 4 KiB page has
LBA, request number and checksum, so no two reads return the same bytes. Sectors that the guest
wrote read back as on any disk. They are stored in a file, whose holes are the sectors that were
never written. A flush is an fdatasync. If the user names no file, the device uses one in memory.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from ..dma import Dma
from ..errors import ProtocolError, UsageError
from ..journal import WriteKind
from ..stamp import SECTOR_BYTES, SECTORS_PER_PAGE, stamped_page
from ..units import PAGE_BYTES, div_ceil
from ..virtqueue import DescriptorChain, Segment
from .device import VirtioDevice
from .segments import gather, scatter, take

_F_SEG_MAX: Final = 1 << 2
_F_BLK_SIZE: Final = 1 << 6
_F_FLUSH: Final = 1 << 9
_F_MQ: Final = 1 << 12

T_IN, _T_OUT, _T_FLUSH, _T_GET_ID = 0, 1, 4, 8
_S_OK, _S_IOERR, _S_UNSUPP = 0, 1, 2

_ID_BYTES: Final = 20
_MAX_REQUEST_BYTES: Final = 32 << 20
"""Larger requests get an I/O error, so that a driver cannot make the process use more memory."""
_SEG_MAX: Final = 126
"""A queue of 128 holds this many data segments besides the request's header and its status."""


class Blk(VirtioDevice):
    """A disk on which every page that was never written has unique content.

    The disk has `capacity_bytes` (a multiple of 4096) and up to `queues` virtqueues. `file` stores
    what the guest has written; the size of a file that is not empty is the disk's capacity.

    Raises:
        UsageError: the file cannot be used.
    """

    name: ClassVar[str] = "blk"
    guests: ClassVar[Collection[str]] = ("bare", "linux")
    options: ClassVar[Mapping[str, Callable[[str], Any]]] = {"file": Path}
    linux: ClassVar[tuple[Sequence[str], str]] = (("virtio_pci", "virtio_blk"), "disk=/dev/vda")
    restartable: ClassVar[bool] = True
    has_workload: ClassVar[bool] = True
    features = _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH | _F_MQ

    def __init__(
        self, capacity_bytes: int = 64 << 30, queues: int = 16, file: Path | None = None
    ) -> None:
        self.queues = queues
        self._content = _Content(file, capacity_bytes)
        self._sectors = self._content.pages * SECTORS_PER_PAGE

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        device = (f"vhost-user-blk-pci,chardev={chardev}", f"num-queues={queues}", "queue-size=128")
        return ["-device", ",".join((*device, *properties))]

    def config(self) -> bytes:
        """Return the fields of struct virtio_blk_config (section 5.2.4)."""
        return struct.pack(
            "<QIIHBBI BBHI BBH",
            self._sectors,
            0,  # size_max: not offered
            _SEG_MAX,
            *(0, 0, 0),  # geometry: not offered
            SECTOR_BYTES,
            *(0, 0, 0, 0),  # topology: not offered
            *(0, 0),  # writeback: not offered; one unused byte
            self.queues,
        )

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """Serve a struct virtio_blk_req (section 5.2.6)."""
        self.begin_request(dma)
        header = gather(take(chain.readable, 0, 16), dma)
        writable = sum(length for _, length in chain.writable)
        if len(header) < 16 or writable < 1:
            raise ProtocolError(
                f"block request {self.requests}: expected 16 readable header bytes and a writable "
                f"status byte, got {len(header)} readable and {writable} writable bytes"
            )
        kind, _, sector = struct.unpack("<IIQ", header)
        payload = take(chain.writable, 0, writable - 1)
        status_iova = take(chain.writable, writable - 1, 1)[0].iova

        if kind == T_IN:
            status, written = self._read(sector, payload, writable - 1, dma)
        elif kind == _T_OUT:
            status, written = self._write(sector, take(chain.readable, 16, None), dma), 0
        elif kind == _T_FLUSH:
            status, written = self._content.flush(), 0
        elif kind == _T_GET_ID:
            identity = b"dmaproof".ljust(_ID_BYTES, b"\0")[: writable - 1]
            written = scatter(identity, payload, dma)
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
        last = div_ceil(sector + length // SECTOR_BYTES, SECTORS_PER_PAGE)
        try:
            data = b"".join(self._page(page) for page in range(first, last))
        except OSError:
            return _S_IOERR, 0
        start = skipped * SECTOR_BYTES
        return _S_OK, scatter(memoryview(data)[start : start + length], payload, dma)

    def _page(self, page: int) -> bytes:
        written = self._content.read(page)
        if written is None:
            return stamped_page(page * SECTORS_PER_PAGE, self.requests)
        return written

    def _write(self, sector: int, payload: list[Segment], dma: Dma) -> int:
        if self._refused(sector, sum(length for _, length in payload)):
            return _S_IOERR
        data = gather(payload, dma)
        position = 0
        try:
            while position < len(data):
                page, start = divmod(sector * SECTOR_BYTES + position, PAGE_BYTES)
                size = min(PAGE_BYTES - start, len(data) - position)
                content = bytearray(self._page(page))
                content[start : start + size] = data[position : position + size]
                self._content.write(page, content)
                position += size
        except OSError:
            return _S_IOERR
        return _S_OK


_NEVER_WRITTEN: Final = b"dmaproof: this page was never written\n".ljust(PAGE_BYTES, b"\0")


class _Content:
    """The data written to a disk: a file of whole pages, with holes for pages never written.

    Without `file`, a file in memory is used. `pages` is the disk's size. All state is in the file,
    because each side of a migration may be served by its own process.

    A block of the file system may be larger than a page, as on hosts with pages of 64 KiB. Once one
    of its pages was written, it has no holes, and the other pages contain `_NEVER_WRITTEN`.
    """

    def __init__(self, file: Path | None, capacity_bytes: int) -> None:
        if file is None:
            self._fd = os.memfd_create("disk")
        else:
            self._fd = _open(file)
            capacity_bytes = os.fstat(self._fd).st_size or capacity_bytes
        weakref.finalize(self, os.close, self._fd)
        if capacity_bytes <= 0 or capacity_bytes % PAGE_BYTES:
            raise UsageError(
                f"disk of {capacity_bytes} bytes ({file or 'in memory'}): expected a multiple of "
                f"{PAGE_BYTES} bytes above 0"
            )
        os.ftruncate(self._fd, capacity_bytes)
        self.pages = capacity_bytes // PAGE_BYTES
        self._block_pages = div_ceil(os.fstat(self._fd).st_blksize, PAGE_BYTES)

    def _is_hole(self, first: int, end: int) -> bool:
        """Return whether no page from `first` to before `end` has data."""
        try:
            return os.lseek(self._fd, first * PAGE_BYTES, os.SEEK_DATA) >= end * PAGE_BYTES
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: there is no data from here to the end
                raise
            return True

    def read(self, page: int) -> bytes | None:
        """Return the content of a page; None if the page was never written."""
        if self._is_hole(page, page + 1):
            return None
        content = os.pread(self._fd, PAGE_BYTES, page * PAGE_BYTES)
        return None if content == _NEVER_WRITTEN else content

    def write(self, page: int, content: bytes | bytearray) -> None:
        """Write the content of a page.

        Raises:
            OSError: the file cannot store it.
        """
        first = page - page % self._block_pages
        end = min(first + self._block_pages, self.pages)
        if end - first > 1 and self._is_hole(first, end):
            self._put(first, _NEVER_WRITTEN * (end - first))
        self._put(page, content)

    def _put(self, page: int, content: bytes | bytearray) -> None:
        if os.pwrite(self._fd, content, page * PAGE_BYTES) != len(content):
            raise OSError(errno.ENOSPC, "only a part of the data was written")

    def flush(self) -> int:
        """Make written data durable, and return the status for the request."""
        try:
            os.fdatasync(self._fd)
        except OSError:
            return _S_IOERR
        return _S_OK


def _open(file: Path) -> int:
    """Open a disk's file; create it if it does not exist."""
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"the disk's file {file}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"the disk's file {file} is not a regular file")
    return fd
