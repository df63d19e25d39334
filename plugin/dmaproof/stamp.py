"""Stamped pages: the content that an emulated device writes, never the same twice.

A stale page can be distinguished from a fresh one only if the device never writes the same bytes
twice. A stamped page is 512 little-endian 64-bit words:

=====  ==================================================================
word   meaning
=====  ==================================================================
0      `MAGIC`
1      LBA: number of the page's first 512-byte sector
2      request number: device-wide, from 1, strictly increasing
3…511  checksum(LBA, request number) + word number (mod 2**64)
=====  ==================================================================

The LBA and the request number determine the whole page, so a page can be checked by itself. The
guests (``guests/workload.c``) check every page that they read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .splitmix import MASK, splitmix64
from .units import PAGE_BYTES

SECTOR_BYTES = 512
SECTORS_PER_PAGE = PAGE_BYTES // SECTOR_BYTES
MAGIC = int.from_bytes(b"DMAPROOF", "little")

_WORDS = PAGE_BYTES // 8
_FIRST_CHECKED_WORD = 3
_RAMP = np.arange(_WORDS, dtype=np.uint64)


class Stamp(NamedTuple):
    """The LBA and the request number in a stamped page."""

    lba: int
    """The number of the page's first 512-byte sector."""
    request: int
    """The request's number."""


def checksum(lba: int, request: int) -> int:
    """Return the 64-bit number from which the words after a stamp's head count up."""
    return splitmix64(lba ^ (request << 32 | request >> 32) & MASK)


def stamped_page(lba: int, request: int) -> bytes:
    """Return the content of a page that no other request writes.

    Args:
        lba: the number of the page's first 512-byte sector.
        request: the request's number.

    Returns:
        4096 bytes, all of them determined by the two numbers.

    Example:
        >>> read_stamp(stamped_page(8, request=5))
        Stamp(lba=8, request=5)
    """
    words = _RAMP + np.uint64(checksum(lba, request))
    words[0] = MAGIC
    words[1] = lba
    words[2] = request
    return words.astype("<u8", copy=False).tobytes()


def read_stamp(page: bytes | memoryview) -> Stamp | None:
    """Read the stamp of a page.

    Args:
        page: the page's bytes.

    Returns:
        The stamp, or None if the page is not a whole and unchanged stamped page.

    Example:
        >>> read_stamp(bytes(4096)) is None
        True
    """
    if len(page) != PAGE_BYTES:
        return None
    words = np.frombuffer(page, dtype="<u8")
    if int(words[0]) != MAGIC:
        return None
    stamp = Stamp(lba=int(words[1]), request=int(words[2]))
    return stamp if stamped_page(*stamp) == bytes(page) else None
