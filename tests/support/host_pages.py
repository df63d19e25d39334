"""The size of the host's pages in tests, and a host with larger pages than this one.

If the pages of the host are larger than 4 KiB, `PER_PAGE` of dmaproof's pages share one: they are
populated together, and absent together.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import numpy as np
from numpy.typing import ArrayLike

from dmaproof.units import PAGE_BYTES

HOST_PAGE: Final = mmap.PAGESIZE
PER_PAGE: Final = HOST_PAGE // PAGE_BYTES
IS_ALONE: Final = PER_PAGE == 1
"""Whether no page shares a page of the host with others, so that absence is certain."""
SIZES: Final = tuple(mmap.PAGESIZE * factor for factor in (1, 4, 16))
"""On a host with pages of 4 KiB: all sizes that arm64 has."""


def of_each(flags: ArrayLike) -> list[bool]:
    """Return one flag for each page of the host, from equal flags of the pages that share it."""
    rows = np.asarray(flags).reshape(-1, PER_PAGE)
    assert (rows == rows[:, :1]).all(), rows
    return [bool(row[0]) for row in rows]


@contextmanager
def host_pages(size: int) -> Iterator[None]:
    """Let the pages of the host seem to have `size` bytes, at least as many as they have.

    This concerns mappings and /proc/PID/pagemap.
    """

    class Mapping(mmap.mmap):
        def __new__(cls, *arguments: Any, **options: Any) -> Mapping:
            if options.get("offset", 0) % size:
                raise OSError(22, f"a host with pages of {size} bytes refuses {options}")
            return super().__new__(cls, *arguments, **options)

    with mock.patch.multiple(mmap, PAGESIZE=size, ALLOCATIONGRANULARITY=size, mmap=Mapping):
        yield
