"""Digest memory page by page: 128 bits that are equal only if the pages are equal.

The digest is XXH3-128 of the page's 4096 bytes, which is as fast as reading the memory. By chance,
two pages that differ have the same digest in one of 2**128 cases. XXH3 is not a cryptographic
digest: two such pages can be constructed on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES

DIGEST_BYTES: Final = 16
_READ_AT_ONCE_BYTES: Final = 1 << 20
"""Small enough for the cache of a processor."""
_OF_ZEROS: Final = np.frombuffer(xxhash.xxh3_128_digest(bytes(PAGE_BYTES)), dtype="<u8")


def page_digests(
    pages: int,
    data_runs: Iterable[tuple[int, int]],
    read_into: Callable[[int, memoryview], None],
) -> NDArray[np.uint64]:
    """Digest `pages` consecutive pages of 4 KiB.

    Args:
        pages: the number of pages.
        data_runs: the (start, end) runs of bytes, in whole pages, that may not be zeros; only these
            are read.
        read_into: reads into a buffer from a byte offset on.

    Returns:
        Two words for each page, of shape (pages, 2) and dtype '<u8': the 16 bytes that XXH3-128
        defines as its canonical form. Both words of a page of zeros are 0.
    """
    digests = np.zeros((pages, 2), dtype="<u8")
    view = memoryview(bytearray(_READ_AT_ONCE_BYTES))
    for begin, end in data_runs:
        for position in range(begin, end, _READ_AT_ONCE_BYTES):
            content = view[: min(end - position, _READ_AT_ONCE_BYTES)]
            read_into(position, content)
            first = position // PAGE_BYTES
            digests[first : first + len(content) // PAGE_BYTES] = _digests_of(content)
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
