"""iommufd's rules for the dirty bits of a hardware page table, tried on its own test device.

The rules come from io_pagetable.c and iova_bitmap.c in drivers/iommu/iommufd, and from
drivers/iommu/generic_pt.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

import numpy as np

from dmaproof.units import PAGE_BYTES
from dmaproof.vfio.requests import Bits, address_of, bitmap_for

from .mock_iommu import APERTURE, HUGE_ENTRY_BYTES, MockIommu, mock_iommu
from .outcome import Rule, errno_of, observe, refuses, require, require_defect

_WORD: Final = 64 * PAGE_BYTES
"""The bytes of IOVA that a word of the bitmap covers."""
_HUGE: Final = HUGE_ENTRY_BYTES
_HALF_PAGES: Final = _HUGE // PAGE_BYTES // 2


@contextlib.contextmanager
def _tracking(length: int, *, huge: bool = False) -> Iterator[MockIommu]:
    with mock_iommu(length, huge=huge) as mock:
        mock.iommufd.set_dirty_tracking(mock.hwpt, True)
        yield mock


def _dirty(mock: MockIommu, iova: int, pages: int = 1, page_size: int = PAGE_BYTES) -> None:
    bits = bitmap_for(pages * page_size, page_size)
    bits.view(np.uint8)[:] = 0xFF
    mock.set_dirty(iova, pages * page_size, page_size, bits)


def _get(
    mock: MockIommu, iova: int, length: int, bits: Bits | None = None, *, clear: bool = True
) -> Bits:
    return mock.iommufd.get_dirty_bitmap(
        mock.hwpt, iova, length, PAGE_BYTES, bits=bits, clear=clear
    )


def _hwpt_refuses(expected: int, iova: int, length: int, page_size: int = PAGE_BYTES) -> str:
    bits = np.zeros(64, dtype=np.uint64)
    with _tracking(_WORD) as mock:
        return refuses(
            expected,
            lambda: mock.iommufd.get_dirty_bitmap(mock.hwpt, iova, length, page_size, bits=bits),
        )


def _hwpt_end_of_space() -> str:
    with _tracking(_WORD) as mock:
        number = errno_of(lambda: _get(mock, 2**64 - _WORD, _WORD))
    require(number != errno.EOVERFLOW, "EOVERFLOW")
    return _name(number)


def _name(number: int) -> str:
    return errno.errorcode.get(number, "no error")


def _hwpt_odd_page_size() -> str:
    with _tracking(_WORD) as mock:
        _dirty(mock, APERTURE + 2 * PAGE_BYTES)
        bits = np.zeros(64, dtype=np.uint64)
        number = errno_of(
            lambda: mock.iommufd.get_dirty_bitmap(mock.hwpt, APERTURE, _WORD, 0x3000, bits=bits)
        )
    require_defect(
        not number and int(bits[0]) == 1 << 2,
        number == errno.EINVAL and not bits.any(),
        f"{_name(number)}, bits {int(bits[0]):#x}",
    )
    return "0x3000 is accepted, and has the effect of 0x1000"


def _hwpt_enable_clears() -> str:
    with _tracking(_WORD) as mock:
        _dirty(mock, APERTURE)
        mock.iommufd.set_dirty_tracking(mock.hwpt, False)
        mock.iommufd.set_dirty_tracking(mock.hwpt, True)
        bits = _get(mock, APERTURE, _WORD)
    require(not bits.any(), f"{int(bits[0]):#x}")
    return "no page is dirty afterwards"


def _hwpt_no_clear() -> str:
    with _tracking(_WORD) as mock:
        _dirty(mock, APERTURE + PAGE_BYTES)
        found = [int(_get(mock, APERTURE, _WORD, clear=clear)[0]) for clear in (False, True, True)]
    require(found == [2, 2, 0], str(found))
    return "the bit is read twice, and then cleared"


def _hwpt_ors() -> str:
    with _tracking(_WORD) as mock:
        _dirty(mock, APERTURE)
        bits = _get(mock, APERTURE, _WORD, np.array([1 << 63], dtype=np.uint64))
    require(int(bits[0]) == 1 << 63 | 1, f"{int(bits[0]):#x}")
    return "bits that were set stay set"


def _hwpt_hole() -> str:
    """Read a range with two dirty mappings and a hole of a word between them."""
    with _tracking(_WORD) as mock:
        memory = address_of(mock.memory)
        mock.iommufd.map(mock.ioas, APERTURE + 2 * _WORD, memory, _WORD)
        _dirty(mock, APERTURE)
        _dirty(mock, APERTURE + 2 * _WORD)
        first = bitmap_for(3 * _WORD, PAGE_BYTES)
        number = errno_of(lambda: _get(mock, APERTURE, 3 * _WORD, first))
        before, later = (_get(mock, APERTURE + skip, _WORD) for skip in (0, 2 * _WORD))
    require(int(before[0]) | int(first[0]) == 1, "the page before the hole is lost")
    require(int(later[0]) | int(first[2]) == 1, "the page after the hole is lost")
    complete = int(first[0]) == 1 and int(first[2]) == 1
    require_defect(
        not number and not complete,
        number == errno.EINVAL or complete,
        f"{_name(number)}, words {[int(word) for word in first]}",
    )
    return "success; the dirty page after the hole is not reported, but stays for the next request"


def _huge_entry(iova: int) -> tuple[int, int, int]:
    """Request half of a dirty huge entry, from `iova` on.

    Returns the number of pages reported in that half, of bits set beyond the end of the bitmap, and
    of pages of the entry that are dirty afterwards.
    """
    with _tracking(2 * _HUGE, huge=True) as mock:
        _dirty(mock, APERTURE + _HUGE)
        whole = _pages(_get(mock, APERTURE, 2 * _HUGE, clear=False))
        observe(whole == 2 * _HALF_PAGES, f"the entry is not huge: {whole} pages")
        memory = bitmap_for(4 * _HUGE, PAGE_BYTES)
        _get(mock, iova, _HUGE // 2, memory)
        rest = _pages(_get(mock, APERTURE, 2 * _HUGE))
    words = _HALF_PAGES // 64
    return _pages(memory[:words]), _pages(memory[words:]), rest


def _is_exact(reported: int, beyond: int, rest: int) -> bool:
    """Return whether the request reported its half, and left the entry dirty for the other half."""
    return (reported, beyond, rest) == (_HALF_PAGES, 0, 2 * _HALF_PAGES)


def _pages(bits: Bits) -> int:
    return int(np.bitwise_count(bits).sum())


def _huge_cut_before() -> str:
    reported, beyond, rest = _huge_entry(APERTURE + _HUGE + _HUGE // 2)
    found = f"{reported} of {_HALF_PAGES} dirty pages reported, {rest} dirty afterwards"
    exact = _is_exact(reported, beyond, rest)
    require_defect(not exact, exact, found)
    return found


def _huge_cut_after() -> str:
    reported, beyond, rest = _huge_entry(APERTURE + _HUGE)
    found = (
        f"{reported} pages reported, {beyond} bits set beyond the bitmap's end, "
        f"{rest} pages dirty afterwards"
    )
    exact = _is_exact(reported, beyond, rest)
    require_defect(not exact, exact, found)
    return found


def iommufd_rules() -> dict[str, Rule]:
    """Return the checks by the rule that each one checks."""
    return {
        "HWPT: a length of 0 is EINVAL": lambda: _hwpt_refuses(errno.EINVAL, APERTURE, 0),
        "HWPT: an unaligned IOVA is EINVAL": lambda: _hwpt_refuses(
            errno.EINVAL, APERTURE + 512, _WORD
        ),
        "HWPT: a page size of 0 is EINVAL": lambda: _hwpt_refuses(errno.EINVAL, APERTURE, _WORD, 0),
        "HWPT: a range that ends at 2**64 is not an overflow": _hwpt_end_of_space,
        "HWPT: a page size that is not a power of two is accepted": _hwpt_odd_page_size,
        "HWPT: enabling clears the dirty bits": _hwpt_enable_clears,
        "HWPT: NO_CLEAR reads without clearing": _hwpt_no_clear,
        "HWPT: only sets bits": _hwpt_ors,
        "HWPT: a hole ends the walk, and the request succeeds": _hwpt_hole,
        "HWPT: a huge entry that begins before the requested range is lost": _huge_cut_before,
        "HWPT: a huge entry that ends after the requested range overruns the bitmap": (
            _huge_cut_after
        ),
    }
