"""VFIO's rules: DMA logging, the kernel's iterator, and type1's dirty pages.

The rules come from vfio_ioctl_device_feature_logging_… in drivers/vfio/vfio_main.c,
drivers/iommu/iommufd/iova_bitmap.c and drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from dmaproof.iova_bitmap import IovaRange
from dmaproof.units import PAGE_BYTES
from dmaproof.vfio import abi
from dmaproof.vfio.abi import Feature
from dmaproof.vfio.requests import Bits, address_of, bitmap_for, feature

from .fake_driver import IOVA, FakeDriver, any_driver, container_driver
from .outcome import Rule, errno_of, observe, refuses, require, require_defect

_WORD: Final = 64 * PAGE_BYTES
"""The bytes of IOVA that a word of the bitmap covers."""


@contextlib.contextmanager
def _logging() -> Iterator[FakeDriver]:
    with any_driver() as driver:
        driver.device.start_logging([IovaRange(0, 1 << 52)], PAGE_BYTES)
        yield driver


def _mark(driver: FakeDriver, iova: int, length: int) -> None:
    driver.fake.mark(np.array([iova], dtype=np.uint64), np.array([length], dtype=np.uint64))


def _write(driver: FakeDriver, iova: int, length: int = 1) -> None:
    driver.fake.write(np.array([iova], dtype=np.uint64), np.array([length], dtype=np.uint64))


# VFIO: starting ----------------------------------------------------------------------------------


def _start(expected: int, ranges: list[IovaRange], page_size: int = PAGE_BYTES) -> str:
    with any_driver() as driver:
        return refuses(expected, lambda: driver.device.start_logging(ranges, page_size))


def _start_256() -> str:
    with any_driver() as driver:
        driver.device.start_logging(
            [IovaRange(i * 2 * PAGE_BYTES, PAGE_BYTES) for i in range(256)], PAGE_BYTES
        )
    return "256 ranges are accepted"


def _start_other_page_size() -> str:
    with any_driver() as driver:
        used = driver.device.start_logging([IovaRange(0, _WORD)], 2048)
    require(used == PAGE_BYTES, f"the page size became {used}")
    return "the device changed 2048 to 4096"


def _start_rules() -> dict[str, Rule]:
    start = IovaRange
    return {
        "START: no range is EINVAL": lambda: _start(errno.EINVAL, []),
        "START: 256 ranges are accepted": _start_256,
        "START: 257 ranges are E2BIG": lambda: _start(
            errno.E2BIG, [start(i * 2 * PAGE_BYTES, PAGE_BYTES) for i in range(257)]
        ),
        "START: a range not aligned to the page size is EINVAL": lambda: _start(
            errno.EINVAL, [start(512, PAGE_BYTES)]
        ),
        "START: ranges that overlap are EINVAL": lambda: _start(
            errno.EINVAL, [start(0, 2 * PAGE_BYTES), start(PAGE_BYTES, PAGE_BYTES)]
        ),
        "START: a range that ends at 2**64 is EOVERFLOW": lambda: _start(
            errno.EOVERFLOW, [start(2**64 - PAGE_BYTES, PAGE_BYTES)]
        ),
        "START: the driver may change the page size": _start_other_page_size,
    }


# VFIO: reporting ---------------------------------------------------------------------------------


def _report(expected: int, iova: int, length: int, page_size: int) -> str:
    with _logging() as driver:
        bits = np.zeros(64, dtype=np.uint64)
        return refuses(expected, lambda: driver.device.report(iova, length, page_size, bits))


def _report_ors() -> str:
    with _logging() as driver:
        bits = np.array([1 << 63], dtype=np.uint64)
        _write(driver, IOVA)
        driver.device.report(IOVA, _WORD, PAGE_BYTES, bits)
    require(int(bits[0]) == 1 << 63 | 1, f"{int(bits[0]):#x}")
    return "bits that were set stay set"


def _report_clears() -> str:
    with _logging() as driver:
        _write(driver, IOVA)
        first = driver.device.report(IOVA, _WORD, PAGE_BYTES)
        second = driver.device.report(IOVA, _WORD, PAGE_BYTES)
    require(int(first[0]) == 1 and not second.any(), f"{int(first[0]):#x}, {int(second[0]):#x}")
    return "1 page, then none"


def _report_unaligned_base() -> str:
    """Check that bits count from the base, so that a page around an unaligned base has two."""
    with _logging() as driver:
        _mark(driver, _WORD + PAGE_BYTES, PAGE_BYTES)
        bits = driver.device.report(_WORD + 512, _WORD, PAGE_BYTES)
    observe(int(bits[0]) == 0b11, f"bits {int(bits[0]):#x}")
    return "accepted; one page set two bits"


def _report_begins_before() -> str:
    with _logging() as driver:
        _mark(driver, _WORD - PAGE_BYTES, 3 * PAGE_BYTES)
        bits = driver.device.report(_WORD, _WORD, PAGE_BYTES)
    require_defect(not bits.any(), int(bits[0]) == 0b11, f"bits {int(bits[0]):#x}")
    return (
        "3 pages reported, the first one before the requested range: no bit was set for the others"
    )


def _report_overruns() -> str:
    with _logging() as driver:
        _mark(driver, _WORD, 2 * _WORD)
        bits = np.zeros(512, dtype=np.uint64)
        driver.device.report(_WORD, _WORD, PAGE_BYTES, bits[:1])
    beyond = int(np.bitwise_count(bits[1:]).sum())
    require(int(bits[0]) == 2**64 - 1, f"bits {int(bits[0]):#x}")
    require_defect(beyond > 0, beyond == 0, f"{beyond} bits set beyond the bitmap")
    return f"{beyond} bits set beyond the 64 bits of the bitmap"


def _report_unmapped_bitmap() -> str:
    """Report into a bitmap of two pages, of which the second cannot be written."""
    libc = ctypes.CDLL(None, use_errno=True)
    mapping = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory = np.frombuffer(mapping, dtype=np.uint64)
    second_page = ctypes.c_void_p(address_of(memory) + mmap.PAGESIZE)
    if libc.mprotect(second_page, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    with _logging() as driver:
        _mark(
            driver, mmap.PAGESIZE * 8 * PAGE_BYTES, PAGE_BYTES
        )  # the first bit of the second page
        number = errno_of(
            lambda: driver.device.report(0, 2 * mmap.PAGESIZE * 8 * PAGE_BYTES, PAGE_BYTES, memory)
        )
    libc.mprotect(second_page, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)
    require(not memory.any(), "the bit is set")
    require_defect(
        not number,
        number == errno.EFAULT,
        f"the report fails with {errno.errorcode.get(number, number)}",
    )
    return "the report succeeds, the bit is lost"


def _report_half_the_space() -> str:
    with _logging() as driver:
        bits = driver.device.report(0, 1 << 63, 1 << 63)
    return f"{len(bits)} word, no division by zero"


def _report_when_off() -> str:
    with any_driver() as driver:
        return refuses(errno.EINVAL, lambda: driver.device.report(0, _WORD, PAGE_BYTES))


def _probe() -> str:
    with any_driver() as driver:
        require(driver.device.can_log(), "PROBE says that the device cannot log")
        feature(driver.device.fd, Feature.DMA_LOGGING_STOP, abi.FEATURE_SET)
    return "START can be probed without starting; STOP while logging is off has no effect"


def _report_rules() -> dict[str, Rule]:
    return {
        "PROBE: logging can be probed": _probe,
        "REPORT: without START is EINVAL": _report_when_off,
        "REPORT: a page size under 4 KiB is EINVAL": lambda: _report(errno.EINVAL, 0, _WORD, 2048),
        "REPORT: a page size that is not a power of two is EINVAL": lambda: _report(
            errno.EINVAL, 0, _WORD, 0x3000
        ),
        "REPORT: a range that ends at 2**64 is EOVERFLOW": lambda: _report(
            errno.EOVERFLOW, 2**64 - _WORD, _WORD, PAGE_BYTES
        ),
        "REPORT: only sets bits": _report_ors,
        "REPORT: clears what it reported": _report_clears,
        "REPORT: an unaligned base is accepted, and a page then has two bits": (
            _report_unaligned_base
        ),
        "REPORT: a page size of 2**63 is harmless": _report_half_the_space,
        "ITERATOR: a range that begins before the bitmap is dropped entirely": (
            _report_begins_before
        ),
        "ITERATOR: a range that ends after the bitmap overruns it": _report_overruns,
        "ITERATOR: if the bitmap cannot be written, bits are lost silently": (
            _report_unmapped_bitmap
        ),
    }


# type1 -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _type1() -> Iterator[tuple[FakeDriver, Callable[..., Bits]]]:
    with container_driver() as driver:
        assert driver.container is not None
        driver.container.set_dirty_tracking(True)
        yield driver, driver.container.get_dirty_bitmap


def _type1_overwrites() -> str:
    with _type1() as (driver, get):
        _write(driver, IOVA)
        bits = bitmap_for(driver.window.length, PAGE_BYTES)
        bits[:] = 2**64 - 1
        get(*driver.window, PAGE_BYTES, bits)
    require(int(bits[0]) == 1 and not bits[1:].any(), f"{int(np.bitwise_count(bits).sum())} bits")
    return "bits that were set before are cleared"


def _type1_refuses(cut: int, page_size: int) -> str:
    with _type1() as (driver, get):
        bits = bitmap_for(driver.window.length, PAGE_BYTES)
        return refuses(
            errno.EINVAL,
            lambda: get(driver.window.iova + cut, driver.window.length - cut, page_size, bits),
        )


def _type1_off() -> str:
    with container_driver() as driver:
        container = driver.container
        assert container is not None
        return refuses(errno.EINVAL, lambda: container.get_dirty_bitmap(*driver.window, PAGE_BYTES))


def _type1_rules() -> dict[str, Rule]:
    return {
        "TYPE1: overwrites the bitmap": _type1_overwrites,
        "TYPE1: a page size other than the smallest is EINVAL": lambda: _type1_refuses(
            0, 2 * PAGE_BYTES
        ),
        "TYPE1: a range that splits a mapping is EINVAL": lambda: _type1_refuses(
            PAGE_BYTES, PAGE_BYTES
        ),
        "TYPE1: a request while tracking is off is EINVAL": _type1_off,
    }


def vfio_rules() -> dict[str, Rule]:
    """Return the checks by the rule that each one checks."""
    return {**_start_rules(), **_report_rules(), **_type1_rules()}
