"""A guest's IOMMU, and the driver that maps and unmaps the pages that a device may access.

Single pages are mapped, because the front end reports single pages (QEMU: vhost_device_iotlb_miss).
Freed IOVAs are allocated again first, so that the same IOVA soon leads to another page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from dmaproof.guest_memory import READ, WRITE
from dmaproof.units import PAGE_BYTES, div_ceil

_FIRST_IOVA: Final = 0xF000_0000
"""A PC never has guest RAM at this address."""


class Page(NamedTuple):
    """A page of RAM at `gpa` that is mapped at `iova` for `access` (bits `READ` and `WRITE`)."""

    iova: int
    gpa: int
    access: int


class GuestIommu:
    """An IOMMU that allocates IOVAs from 0xf0000000 on."""

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}
        self._free: list[int] = []
        self._next = _FIRST_IOVA

    def map(self, gpa: int, length: int, access: int = READ | WRITE) -> int:
        """Map `length` bytes at `gpa` once more, and return the IOVA of the first byte."""
        start = gpa % PAGE_BYTES
        return self.map_pages(range(gpa - start, gpa + length, PAGE_BYTES), access) + start

    def map_pages(self, gpas: Sequence[int], access: int = READ | WRITE) -> int:
        """Map pages of RAM at consecutive IOVAs, and return the IOVA of the first page."""
        iova = self._take(len(gpas))
        for number, gpa in enumerate(gpas):
            mapped = Page(iova + number * PAGE_BYTES, gpa, access)
            self._pages[mapped.iova] = mapped
        return iova

    def _take(self, pages: int) -> int:
        if pages == 1 and self._free:
            return self._free.pop()
        iova = self._next
        self._next += pages * PAGE_BYTES
        return iova

    def unmap(self, iova: int, length: int) -> None:
        """Remove a mapping."""
        for page in self.pages(iova, length):
            del self._pages[page.iova]
            self._free.append(page.iova)

    def pages(self, iova: int, length: int) -> Iterator[Page]:
        """Yield the pages that `length` bytes at `iova` touch.

        Raises:
            KeyError: one of the pages is not mapped.
        """
        for number in range(iova // PAGE_BYTES, div_ceil(iova + length, PAGE_BYTES)):
            yield self._pages[number * PAGE_BYTES]

    def all_pages(self) -> list[Page]:
        """Return every page that is mapped."""
        return list(self._pages.values())

    def page(self, iova: int, access: int) -> Page | None:
        """Return the page at `iova` if the device may access it for `access`, else None."""
        found = self._pages.get(iova // PAGE_BYTES * PAGE_BYTES)
        return found if found is not None and not access & ~found.access else None
