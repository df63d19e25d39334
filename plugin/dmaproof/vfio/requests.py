"""Requests to the kernel, whose errors name the rule that was broken."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import TrackerError
from ..units import div_ceil
from .abi import DEVICE_FEATURE, FEATURE_RULES, Feature, Request

_FEATURE = Request("VFIO_DEVICE_FEATURE", ord(";") << 8 | 117)
_GENERAL = {
    errno.ENOTTY: "this kernel or this device does not know the request",
    errno.EBADF: "the file is closed",
    errno.EPERM: "not permitted: run this as root, or as the owner of the device file",
}

_PAGE_WORDS: Final = mmap.PAGESIZE // 8

Bits = NDArray[np.uint64]


class VfioError(TrackerError):
    """The kernel refused a request; `number` is the errno."""

    def __init__(self, request: str, number: int, rule: str | None) -> None:
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{request}: {name}: {rule or os.strerror(number)}")
        self.request = request
        self.number = number


class KernelFile:
    """An open device file of the kernel. The object owns `fd` and closes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def request(fd: int, what: Request, data: bytearray | int = 0) -> int:
    """Make a request; `data` is a structure, which the kernel may change, or a plain argument.

    Returns the ioctl's result.

    Raises:
        VfioError: the kernel refused it.
    """
    return _ioctl(fd, what.number, data, what.name, what.rules)


def feature(fd: int, which: Feature, flags: int, data: bytes = b"") -> bytes:
    """Make a VFIO_DEVICE_FEATURE request, and return `data` as the kernel changed it.

    Raises:
        VfioError: the kernel refused it.
    """
    buffer = bytearray(DEVICE_FEATURE.pack(DEVICE_FEATURE.size + len(data), which | flags) + data)
    name = f"{_FEATURE.name} {which.name}"
    _ioctl(fd, _FEATURE.number, buffer, name, FEATURE_RULES.get(which, {}))
    return bytes(buffer[DEVICE_FEATURE.size :])


def _ioctl(fd: int, number: int, data: bytearray | int, name: str, rules: Mapping[int, str]) -> int:
    try:
        return fcntl.ioctl(fd, number, data)
    except OSError as error:
        failed = error.errno or 0
        raise VfioError(name, failed, rules.get(failed, _GENERAL.get(failed))) from error


def address_of(memory: Any) -> int:
    """Return the address of a writable buffer; the caller must keep the buffer alive."""
    if isinstance(memory, np.ndarray):
        return int(memory.ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def bitmap_for(length: int, page_size: int) -> Bits:
    """Return an empty bitmap for `length` bytes in pages of `page_size`: whole uint64 words.

    No other data shares the bitmap's memory pages: when a driver reports more than the requested
    range, the kernel may write up to the end of the bitmap's last memory page (iova_bitmap_set).
    """
    words = div_ceil(length, 64 * page_size)
    memory = np.zeros((div_ceil(words, _PAGE_WORDS) + 1) * _PAGE_WORDS, dtype=np.uint64)
    start = -address_of(memory) % mmap.PAGESIZE // 8
    return memory[start : start + words]
