"""A host with larger pages than this one, as far as mappings and /proc/PID/pagemap show them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

SIZES: Final = tuple(mmap.PAGESIZE * factor for factor in (1, 4, 16))
"""On a host with pages of 4 KiB: all sizes that arm64 has."""


@contextmanager
def host_pages(size: int) -> Iterator[None]:
    """Let the pages of the host have `size` bytes, at least as many as they really have."""

    class Mapping(mmap.mmap):
        def __new__(cls, *arguments: Any, **options: Any) -> Mapping:
            if options.get("offset", 0) % size:
                raise OSError(22, f"a host with pages of {size} bytes refuses {options}")
            return super().__new__(cls, *arguments, **options)

    with mock.patch.multiple(mmap, PAGESIZE=size, ALLOCATIONGRANULARITY=size, mmap=Mapping):
        yield
