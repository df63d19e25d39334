"""iommufd: I/O address spaces, hardware page tables and their dirty bits."""

from __future__ import annotations

import os
from typing import Final

from . import abi
from .requests import Bits, KernelFile, address_of, bitmap_for, request

PATH: Final = "/dev/iommu"


class Iommufd(KernelFile):
    """An open /dev/iommu. Its objects are numbers, and are destroyed when it is closed.

    Raises:
        OSError: this kernel has no iommufd, or the file cannot be opened.
    """

    def __init__(self, path: str = PATH) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def alloc_ioas(self) -> int:
        """Make an empty I/O address space (IOAS), and return its number."""
        size = abi.IOAS_ALLOC_DATA.size
        data = bytearray(abi.IOAS_ALLOC_DATA.pack(size, 0, 0))
        request(self.fd, abi.IOAS_ALLOC, data)
        return int(abi.IOAS_ALLOC_DATA.unpack(data)[2])

    def map(self, ioas: int, iova: int, address: int, length: int) -> None:
        """Map `length` bytes of this process at `address` to `iova`, readable and writable.

        Raises:
            VfioError: the range is already mapped or not aligned, or `address` is not memory.
        """
        flags = abi.IOAS_MAP_FIXED | abi.IOAS_MAP_READABLE | abi.IOAS_MAP_WRITEABLE
        size = abi.IOAS_MAP_DATA.size
        data = bytearray(abi.IOAS_MAP_DATA.pack(size, flags, ioas, 0, address, length, iova))
        request(self.fd, abi.IOAS_MAP, data)

    def unmap(self, ioas: int, iova: int, length: int) -> None:
        """Remove mappings.

        Raises:
            VfioError: nothing is mapped in the range, or the range splits a mapping.
        """
        size = abi.IOAS_UNMAP_DATA.size
        request(
            self.fd, abi.IOAS_UNMAP, bytearray(abi.IOAS_UNMAP_DATA.pack(size, ioas, iova, length))
        )

    def set_huge_pages(self, ioas: int, allowed: bool) -> None:
        """Allow or forbid huge entries in the IOAS's page tables.

        Without huge entries, dirty bits are exact to a page.
        """
        size = abi.OPTION_DATA.size
        data = abi.OPTION_DATA.pack(size, abi.OPTION_HUGE_PAGES, 0, 0, ioas, int(allowed))
        request(self.fd, abi.OPTION, bytearray(data))

    def alloc_hwpt(self, device: int, ioas: int, *, dirty_tracking: bool) -> int:
        """Make a hardware page table of `ioas` for the device with iommufd's number `device`.

        Raises:
            VfioError: the IOMMU cannot track dirty pages.
        """
        flags = abi.HWPT_DIRTY_TRACKING if dirty_tracking else 0
        size = abi.HWPT_ALLOC_DATA.size
        data = bytearray(abi.HWPT_ALLOC_DATA.pack(size, flags, device, ioas, 0, 0, 0, 0, 0, 0, 0))
        request(self.fd, abi.HWPT_ALLOC, data)
        return int(abi.HWPT_ALLOC_DATA.unpack(data)[4])

    def set_dirty_tracking(self, hwpt: int, enable: bool) -> None:
        """Start or stop tracking; starting clears all dirty bits.

        Raises:
            VfioError: the page table was made without dirty tracking.
        """
        flags = abi.DIRTY_TRACKING_ENABLE if enable else 0
        size = abi.SET_DIRTY_TRACKING_DATA.size
        data = abi.SET_DIRTY_TRACKING_DATA.pack(size, flags, hwpt, 0)
        request(self.fd, abi.HWPT_SET_DIRTY_TRACKING, bytearray(data))

    def get_dirty_bitmap(
        self,
        hwpt: int,
        iova: int,
        length: int,
        page_size: int,
        *,
        clear: bool = True,
        bits: Bits | None = None,
    ) -> Bits:
        """Read the dirty pages of `length` bytes from `iova` on, and clear them if `clear`.

        Bit n of the uint64 words is the n-th page from `iova` on. The kernel ORs into `bits`, if
        given.

        Raises:
            VfioError: tracking is not on, or the range is not aligned to the page size.
        """
        bits = bitmap_for(length, page_size) if bits is None else bits
        flags = 0 if clear else abi.DIRTY_BITMAP_NO_CLEAR
        size = abi.GET_DIRTY_BITMAP_DATA.size
        data = abi.GET_DIRTY_BITMAP_DATA.pack(
            size, hwpt, flags, 0, iova, length, page_size, address_of(bits)
        )
        request(self.fd, abi.HWPT_GET_DIRTY_BITMAP, bytearray(data))
        return bits

    def destroy(self, number: int) -> None:
        """Destroy an object.

        Raises:
            VfioError: the object does not exist or is in use.
        """
        request(
            self.fd, abi.DESTROY, bytearray(abi.DESTROY_DATA.pack(abi.DESTROY_DATA.size, number))
        )


class Ioas:
    """A new I/O address space of `iommufd`, with the calls that a `Container` has."""

    def __init__(self, iommufd: Iommufd) -> None:
        self.number = iommufd.alloc_ioas()
        self._iommufd = iommufd

    def map(self, iova: int, address: int, length: int) -> None:
        self._iommufd.map(self.number, iova, address, length)

    def unmap(self, iova: int, length: int) -> None:
        self._iommufd.unmap(self.number, iova, length)
