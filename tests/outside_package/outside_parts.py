"""A third-party tracker, device and fault, written with only the public API."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from dmaproof import (
    DescriptorChain,
    Dma,
    EmulatedTracker,
    Fault,
    IovaBitmap,
    IovaRange,
    Link,
    ProtocolError,
    TrackerError,
    VirtioDevice,
    WriteKind,
    gather,
    scatter,
    stamped_page,
    take,
    uniform,
)

_SECTORS = 1 << 21
_SECTORS_PER_PAGE = 8
_PAGE_BYTES = 4096
_READ, _WRITE = 0, 1
_OK, _UNSUPPORTED = 0, 2


class PageList(EmulatedTracker):
    """A list of the written pages, in the order of their first write."""

    name = "page-list"

    def __init__(self) -> None:
        self._page_size = 0
        self._pages: dict[int, None] | None = None

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Begin with an empty list, for pages of any range."""
        if self._pages is not None:
            raise TrackerError("the page list is already started")
        self._pages, self._page_size = {}, page_size
        return page_size

    def stop(self) -> None:
        """Forget the list."""
        self._pages = None

    def dma(self, iova: int, length: int) -> None:
        """Append the pages that are not in the list."""
        if self._pages is not None:
            first, last = iova // self._page_size, (iova + length - 1) // self._page_size
            self._pages |= dict.fromkeys(self.heard(range(first, last + 1)))

    def heard(self, pages: range) -> Sequence[int]:
        """Return the pages of which the list notices a write: all of them."""
        return pages

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        """Report the listed pages of the range, and remove them from the list."""
        if self._pages is None:
            raise TrackerError("the list of pages does not track: call start first")
        size = self._page_size
        for page in [page for page in self._pages if iova <= page * size < iova + length]:
            bitmap.set(page * size, min(size, iova + length - page * size))
            del self._pages[page]


class StampedDisk(VirtioDevice):
    """A disk of 1 GiB that keeps what is written, and otherwise returns unique pages."""

    name = "stamped-disk"
    guests = ("linux", "bare")
    linux = (("virtio_pci", "virtio_blk"), "disk=/dev/vda")
    has_workload = True

    def __init__(self) -> None:
        self._written: dict[int, bytes] = {}  # page number: content

    @staticmethod
    def qemu_arguments(chardev: str, queues: int, properties: Sequence[str]) -> list[str]:
        """Return the arguments for one virtio disk with one queue."""
        device = (f"vhost-user-blk-pci,chardev={chardev}", "num-queues=1", *properties)
        return ["-device", ",".join(device)]

    def config(self) -> bytes:
        """Return the first fields of struct virtio_blk_config: capacity, size_max, seg_max."""
        return struct.pack("<QII", _SECTORS, 0, 0)

    def process(self, chain: DescriptorChain, dma: Dma) -> int:
        """Serve a read or a write; refuse any other request with an error status."""
        number = self.begin_request(dma)
        header = gather(take(chain.readable, 0, 16), dma)
        room = sum(length for _, length in chain.writable) - 1
        if len(header) < 16 or room < 0:
            raise ProtocolError(f"block request {number}: without a header or a status byte")
        kind, _, sector = struct.unpack("<IIQ", header)
        written, status = 0, _UNSUPPORTED
        first = sector // _SECTORS_PER_PAGE
        if kind == _READ:
            pages = range(first, first + room // _PAGE_BYTES)
            content = b"".join(self._content(page, number) for page in pages)
            written, status = scatter(content, take(chain.writable, 0, room), dma), _OK
        elif kind == _WRITE:
            data = gather(take(chain.readable, 16, None), dma)
            for start in range(0, len(data), _PAGE_BYTES):
                self._written[first + start // _PAGE_BYTES] = data[start : start + _PAGE_BYTES]
            status = _OK
        status_byte = take(chain.writable, room, 1)[0]
        dma.write(status_byte.iova, bytes([status]), WriteKind.STATUS)
        return written + 1

    def _content(self, page: int, request: int) -> bytes:
        return self._written.get(page, stamped_page(page * _SECTORS_PER_PAGE, request))


class DeafPages(Fault):
    """The list of pages never notices the writes to some of them."""

    name = "deaf-pages"
    link = Link.TRACKER
    tracker = PageList.name
    value_means = "the share of pages"
    default = 0.05

    def wrap_tracker(self, tracker: EmulatedTracker) -> EmulatedTracker:
        """Return a list that ignores the chosen pages."""
        return _DeafList(self.value, self.seed)


class _DeafList(PageList):
    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self._share = share
        self._seed = seed

    def heard(self, pages: range) -> Sequence[int]:
        numbers = np.array(pages, dtype=np.uint64)
        return [int(page) for page in numbers[uniform(numbers, self._seed) >= self._share]]
