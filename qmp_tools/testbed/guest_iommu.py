"""A guest's IOMMU, and the driver that maps what it gives to a device: pages come and go.

Single pages are mapped, as the front end tells of them (QEMU: vhost_device_iotlb_miss), and the
IOVAs of what is taken away are dealt out again first: the same IOVA soon leads to another page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from dmaproof.guest_memory import READ, WRITE
from dmaproof.units import PAGE_BYTES, div_ceil

_FIRST_IOVA: Final = 0xF000_0000
"""Where guest RAM never is on a PC."""


class Page(NamedTuple):
    """The page of RAM at `gpa` is mapped at `iova`, for `access` (bits, `READ` and `WRITE`)."""

    iova: int
    gpa: int
    access: int


class GuestIommu:
    """Deals out IOVAs from 0xf0000000 on."""

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}
        self._free: list[int] = []
        self._next = _FIRST_IOVA

    def map(self, gpa: int, length: int, access: int = READ | WRITE) -> int:
        """Map `length` bytes at `gpa` once more; returns the IOVA of their first."""
        start = gpa % PAGE_BYTES
        return self.map_pages(range(gpa - start, gpa + length, PAGE_BYTES), access) + start

    def map_pages(self, gpas: Sequence[int], access: int = READ | WRITE) -> int:
        """Map pages of RAM one behind the other; returns the IOVA of the first."""
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
        """Take a mapping away."""
        for page in self.pages(iova, length):
            del self._pages[page.iova]
            self._free.append(page.iova)

    def pages(self, iova: int, length: int) -> Iterator[Page]:
        """The pages that `length` bytes at `iova` touch.

        Raises:
            KeyError: one is not mapped.
        """
        for number in range(iova // PAGE_BYTES, div_ceil(iova + length, PAGE_BYTES)):
            yield self._pages[number * PAGE_BYTES]

    def all_pages(self) -> list[Page]:
        """Every page that is mapped."""
        return list(self._pages.values())

    def page(self, iova: int, access: int) -> Page | None:
        """The page that the device may access so at `iova`; None if there is none."""
        found = self._pages.get(iova // PAGE_BYTES * PAGE_BYTES)
        return found if found is not None and not access & ~found.access else None
