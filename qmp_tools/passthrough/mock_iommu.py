"""iommufd's own test device (CONFIG_IOMMUFD_TEST): user space sets dirty bits in a page table.

The interface comes from drivers/iommu/iommufd/iommufd_test.h; only L1's kernel has it. This module
sets the bits that an IOMMU's hardware would set. iommufd reads them with the code that serves real
IOMMUs.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.vfio import abi
from dmaproof.vfio.abi import Request
from dmaproof.vfio.iommufd import Iommufd
from dmaproof.vfio.requests import Bits, address_of, request

from .fake_driver import open_iommufd

_TEST: Final = Request("IOMMU_TEST_CMD", ord(";") << 8 | 0xA0)
_COMMAND_BYTES: Final = 72
_HEADER: Final = Struct("<IIII")
_DOMAIN: Final = Struct("<IIII")
_REPLACE: Final = Struct("<I")
_DIRTY: Final = Struct("<IIQQQQQ")
_OP_MOCK_DOMAIN_REPLACE: Final = 10
_OP_MOCK_DOMAIN_FLAGS: Final = 12
_OP_DIRTY: Final = 13
_HWPT_DATA_SELFTEST: Final = 0xDEAD
_SELFTEST: Final = Struct("<II")

APERTURE: Final = 1 << 24
"""The first IOVA that the test device can reach; the last is 2**31 - 1."""
HUGE_ENTRY_BYTES: Final = 1 << 20
"""MOCK_HUGE_PAGE_SIZE: an entry of a page table that is allocated with `huge`."""
_HUGE_PAGE_BYTES: Final = 2 << 20


@dataclass(frozen=True)
class MockIommu:
    """The test device with a page table that tracks; `memory` is mapped at `APERTURE`."""

    iommufd: Iommufd
    ioas: int
    hwpt: int
    memory: NDArray[np.uint8]

    def set_dirty(self, iova: int, length: int, page_size: int, bits: Bits) -> None:
        """Set the dirty bit in the page table entry of each page that is set in `bits`.

        Raises:
            VfioError: the range is not aligned to the page size.
        """
        data = _DIRTY.pack(0, 0, iova, length, page_size, address_of(bits), 0)
        _command(self.iommufd, _OP_DIRTY, self.hwpt, data)


def _command(iommufd: Iommufd, operation: int, number: int, data: bytes) -> bytes:
    header = _HEADER.pack(_COMMAND_BYTES, operation, number, 0)
    buffer = bytearray((header + data).ljust(_COMMAND_BYTES, b"\0"))
    request(iommufd.fd, _TEST, buffer)
    return bytes(buffer[_HEADER.size :])


@contextlib.contextmanager
def mock_iommu(length: int, *, huge: bool = False) -> Iterator[MockIommu]:
    """Set up the test device with `length` bytes mapped, in huge page table entries if `huge`."""
    private = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # this kernel has no huge pages for shared memory
    mapping = mmap.mmap(-1, length + _HUGE_PAGE_BYTES, private)
    mapping.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    memory = whole[-address_of(whole) % _HUGE_PAGE_BYTES :][:length]
    memory[:: mmap.PAGESIZE] = 1  # fault the pages in, as huge pages if these are allowed
    with open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        if not huge:
            iommufd.set_huge_pages(ioas, False)
        answer = _command(iommufd, _OP_MOCK_DOMAIN_FLAGS, ioas, _DOMAIN.pack(0, 0, 0, 0))
        device, _, number, _ = _DOMAIN.unpack(answer[: _DOMAIN.size])
        hwpt = _alloc_hwpt(iommufd, number, ioas, huge)
        _command(iommufd, _OP_MOCK_DOMAIN_REPLACE, device, _REPLACE.pack(hwpt))
        iommufd.map(ioas, APERTURE, address_of(memory), length)
        yield MockIommu(iommufd, ioas, hwpt, memory)


def _alloc_hwpt(iommufd: Iommufd, device: int, ioas: int, huge: bool) -> int:
    if not huge:
        return iommufd.alloc_hwpt(device, ioas, dirty_tracking=True)
    kind = np.frombuffer(bytearray(_SELFTEST.pack(0, int(huge))), dtype=np.uint8)
    data = bytearray(
        abi.HWPT_ALLOC_DATA.pack(
            *(abi.HWPT_ALLOC_DATA.size, abi.HWPT_DIRTY_TRACKING, device, ioas, 0, 0),
            *(_HWPT_DATA_SELFTEST, _SELFTEST.size, address_of(kind), 0, 0),
        )
    )
    request(iommufd.fd, abi.HWPT_ALLOC, data)
    return int(abi.HWPT_ALLOC_DATA.unpack(data)[4])
