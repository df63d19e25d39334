"""Digest memory page by page: 128 bits that are equal only if the pages are equal.

The digest is XXH3-128 of the page's 4096 bytes, which is as fast as reading the memory. By chance,
two pages that differ have the same digest in one of 2**128 cases. XXH3 is not a cryptographic
digest: two such pages can be constructed on purpose.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from dmaproof.page_compare import Extent, data_runs
from dmaproof.units import PAGE_BYTES

DIGEST_BYTES: Final = 16
_READ_AT_ONCE_BYTES: Final = 1 << 20
"""Small enough for the cache of a processor."""
_OF_ZEROS: Final = np.frombuffer(xxhash.xxh3_128_digest(bytes(PAGE_BYTES)), dtype="<u8")


def page_digests(extent: Extent, pages: int) -> NDArray[np.uint64]:
    """Digest `pages` pages of 4 KiB from the start of `extent`; holes are not read.

    Returns:
        Two words for each page, of shape (pages, 2) and dtype '<u8': the 16 bytes that XXH3-128
        defines as its canonical form. Both words of a page of zeros are 0.
    """
    digests = np.zeros((pages, 2), dtype="<u8")
    buffer = bytearray(_READ_AT_ONCE_BYTES)
    view = memoryview(buffer)
    for begin, end in data_runs(extent, pages * PAGE_BYTES):
        # A run begins and ends with a page of the machine, which has a whole number of pages.
        for position in range(begin, end, _READ_AT_ONCE_BYTES):
            length = min(end - position, _READ_AT_ONCE_BYTES)
            _read(extent, position, view[:length])
            first = position // PAGE_BYTES
            digests[first : first + length // PAGE_BYTES] = _digests_of(view[:length])
    return digests


def _digests_of(content: memoryview) -> NDArray[np.uint64]:
    digest = xxhash.xxh3_128_digest
    found = b"".join(
        [
            digest(content[start : start + PAGE_BYTES])
            for start in range(0, len(content), PAGE_BYTES)
        ]
    )
    digests = np.frombuffer(found, dtype="<u8").reshape(-1, 2).copy()
    digests[(digests == _OF_ZEROS).all(axis=1)] = 0
    return digests


def _read(extent: Extent, position: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(extent.fd, [into[done:]], extent.offset + position + done)
        if count == 0:  # the file is shorter than the extent
            raise EOFError(f"the file ends {len(into) - done} bytes before its extent")
        done += count
