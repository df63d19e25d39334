"""VFIO's rules: DMA logging, the iterator behind it, and type1's dirty pages.

After vfio_ioctl_device_feature_logging_… in drivers/vfio/vfio_main.c,
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

from .fake_driver import IOVA, FakeDriver, by_container, by_either
from .outcome import Rule, errno_of, observe, refuses, require

_WORD: Final = 64 * PAGE_BYTES
"""What a word of the bitmap stands for."""


@contextlib.contextmanager
def _logging() -> Iterator[FakeDriver]:
    with by_either() as driver:
        driver.device.start_logging([IovaRange(0, 1 << 52)], PAGE_BYTES)
        yield driver


def _mark(driver: FakeDriver, iova: int, length: int) -> None:
    driver.fake.mark(np.array([iova], dtype=np.uint64), np.array([length], dtype=np.uint64))


def _write(driver: FakeDriver, iova: int, length: int = 1) -> None:
    driver.fake.write(np.array([iova], dtype=np.uint64), np.array([length], dtype=np.uint64))


# VFIO: starting ----------------------------------------------------------------------------------


def _start(expected: int, ranges: list[IovaRange], page_size: int = PAGE_BYTES) -> str:
    with by_either() as driver:
        return refuses(expected, lambda: driver.device.start_logging(ranges, page_size))


def _start_256() -> str:
    with by_either() as driver:
        driver.device.start_logging(
            [IovaRange(i * 2 * PAGE_BYTES, PAGE_BYTES) for i in range(256)], PAGE_BYTES
        )
    return "256 ranges are taken"


def _start_other_page_size() -> str:
    with by_either() as driver:
        used = driver.device.start_logging([IovaRange(0, _WORD)], 2048)
    require(used == PAGE_BYTES, f"the page size became {used}")
    return "2048 became 4096, as the device has it"


def _start_rules() -> dict[str, Rule]:
    start = IovaRange
    return {
        "START: no range is EINVAL": lambda: _start(errno.EINVAL, []),
        "START: 256 ranges are taken": _start_256,
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
    """The bit index is relative to the base; a page about an unaligned base has two."""
    with _logging() as driver:
        _mark(driver, _WORD + PAGE_BYTES, PAGE_BYTES)
        bits = driver.device.report(_WORD + 512, _WORD, PAGE_BYTES)
    observe(int(bits[0]) == 0b11, f"bits {int(bits[0]):#x}")
    return "taken without error; one page set two bits"


def _report_begins_before() -> str:
    with _logging() as driver:
        _mark(driver, _WORD - PAGE_BYTES, 3 * PAGE_BYTES)
        bits = driver.device.report(_WORD, _WORD, PAGE_BYTES)
    observe(not bits.any(), f"bits {int(bits[0]):#x}")
    return "3 pages reported from one page before the query on: none of the 2 inside arrived"


def _report_runs_on() -> str:
    with _logging() as driver:
        _mark(driver, _WORD, 2 * _WORD)
        bits = np.zeros(512, dtype=np.uint64)
        driver.device.report(_WORD, _WORD, PAGE_BYTES, bits[:1])
    beyond = int(np.bitwise_count(bits[1:]).sum())
    observe(int(bits[0]) == 2**64 - 1 and beyond > 0, f"{int(bits[0]):#x}, {beyond} bits behind it")
    return f"{beyond} bits set behind the bitmap's 64"


def _report_unmapped_bitmap() -> str:
    """Two pages of address space, of which the second is taken away: the bitmap ends in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    mapping = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory = np.frombuffer(mapping, dtype=np.uint64)
    none = ctypes.c_void_p(address_of(memory) + mmap.PAGESIZE)
    if libc.mprotect(none, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    with _logging() as driver:
        _mark(
            driver, mmap.PAGESIZE * 8 * PAGE_BYTES, PAGE_BYTES
        )  # the first bit of the second page
        number = errno_of(
            lambda: driver.device.report(0, 2 * mmap.PAGESIZE * 8 * PAGE_BYTES, PAGE_BYTES, memory)
        )
    libc.mprotect(none, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)
    observe(not number, f"the report fails, {errno.errorcode.get(number, number)}")
    require(not memory.any(), "the bit arrived")
    return "the report succeeds, the bit is lost"


def _report_half_the_space() -> str:
    with _logging() as driver:
        bits = driver.device.report(0, 1 << 63, 1 << 63)
    return f"{len(bits)} word, no division by zero"


def _report_when_off() -> str:
    with by_either() as driver:
        return refuses(errno.EINVAL, lambda: driver.device.report(0, _WORD, PAGE_BYTES))


def _probe() -> str:
    with by_either() as driver:
        require(driver.device.can_log(), "it cannot")
        feature(driver.device.fd, Feature.DMA_LOGGING_STOP, abi.FEATURE_SET)
    return "START can be asked for without doing it; STOP when off is harmless"


def _report_rules() -> dict[str, Rule]:
    return {
        "PROBE: logging can be asked about": _probe,
        "REPORT: without START is EINVAL": _report_when_off,
        "REPORT: a page size under 4 KiB is EINVAL": lambda: _report(errno.EINVAL, 0, _WORD, 2048),
        "REPORT: a page size that is no power of two is EINVAL": lambda: _report(
            errno.EINVAL, 0, _WORD, 0x3000
        ),
        "REPORT: a range that ends at 2**64 is EOVERFLOW": lambda: _report(
            errno.EOVERFLOW, 2**64 - _WORD, _WORD, PAGE_BYTES
        ),
        "REPORT: only sets bits": _report_ors,
        "REPORT: forgets what it told": _report_clears,
        "REPORT: an unaligned base is taken, and makes two bits of a page": _report_unaligned_base,
        "REPORT: a page size of 2**63 does no harm": _report_half_the_space,
        "ITERATOR: a range that begins before the bitmap is dropped whole": _report_begins_before,
        "ITERATOR: a range that ends behind the bitmap is written on": _report_runs_on,
        "ITERATOR: where the bitmap cannot be written, bits are lost silently": (
            _report_unmapped_bitmap
        ),
    }


# type1 -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _type1() -> Iterator[tuple[FakeDriver, Callable[..., Bits]]]:
    with by_container() as driver:
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
    return "what was in the bitmap is gone"


def _type1_refuses(cut: int, page_size: int) -> str:
    with _type1() as (driver, get):
        bits = bitmap_for(driver.window.length, PAGE_BYTES)
        return refuses(
            errno.EINVAL,
            lambda: get(driver.window.iova + cut, driver.window.length - cut, page_size, bits),
        )


def _type1_off() -> str:
    with by_container() as driver:
        container = driver.container
        assert container is not None
        return refuses(errno.EINVAL, lambda: container.get_dirty_bitmap(*driver.window, PAGE_BYTES))


def _type1_rules() -> dict[str, Rule]:
    return {
        "TYPE1: overwrites the bitmap": _type1_overwrites,
        "TYPE1: only the smallest page size": lambda: _type1_refuses(0, 2 * PAGE_BYTES),
        "TYPE1: a range that cuts a mapping is EINVAL": lambda: _type1_refuses(
            PAGE_BYTES, PAGE_BYTES
        ),
        "TYPE1: tracking that is off is EINVAL": _type1_off,
    }


def vfio_rules() -> dict[str, Rule]:
    """Every rule by what it says."""
    return {**_start_rules(), **_report_rules(), **_type1_rules()}
