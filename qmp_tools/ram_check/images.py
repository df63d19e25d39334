"""Compare two raw images of RAM, as other virtual machine monitors save them.

Firecracker saves a guest's memory into such a file, cloud-hypervisor into ``memory-ranges``. The
images have neither a physical map nor a state, so only their pages are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmaproof.errors import UntestableError, UsageError
from dmaproof.page_compare import Extent
from dmaproof.units import PAGE_BYTES

from ..arguments import AnyPath, path_of
from ..memory.absent_pages import absent_in_file
from ..memory.data_runs import DataRuns
from ..memory.pages import FilePages, differing_pages
from .comparison import MOST_INSPECTED, bytes_differing
from .guest import Side
from .outcome import IMAGE, Check, ComparedArea, Difference
from .snapshot_file import is_snapshot


async def check_images(source: AnyPath, destination: AnyPath) -> Check:
    """Compare two raw images of RAM.

    Args:
        source: the path of the image that was taken before the migration.
        destination: the path of the image that was taken after it.

    Raises:
        UsageError: a path is not that of a regular file, or both are the same file.
        UntestableError: the images have different sizes, or less than a page.

    Example::

        (await check_images("source.mem", "destination.mem")).require_equal()
    """
    paths = [path_of("source", source), path_of("destination", destination)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in paths]
        statuses = [os.fstat(fd) for fd in files]
        if os.path.samestat(*statuses):
            raise UsageError(f"{paths[0]} is given for both sides: give two images")
        sizes = [status.st_size for status in statuses]
        if sizes[0] != sizes[1]:
            raise UntestableError(
                f"{paths[0]} has {sizes[0]} bytes and {paths[1]} has {sizes[1]}: they are not "
                "images of one guest"
            )
        count, rest = divmod(sizes[0], PAGE_BYTES)
        if not count:
            raise UntestableError(f"{paths[0]} has only {sizes[0]} bytes: less than a page")
        return await asyncio.to_thread(_compare, paths, files, count, rest)


def _compare(paths: list[Path], files: list[int], count: int, rest: int) -> Check:
    pages = [_pages(fd, count) for fd in files]
    began_s = time.monotonic()
    found = differing_pages(pages[0], pages[1])
    if rest and pages[0].content(count) != pages[1].content(count):
        found = np.append(found, count)  # the last page is not whole
    compare_s = time.monotonic() - began_s
    sides = [_side(path, count * PAGE_BYTES + rest) for path in paths]
    return Check(
        source=sides[0],
        destination=sides[1],
        areas=[ComparedArea(None, IMAGE, 0, count + bool(rest), found)],
        differences=[
            Difference(
                None,
                IMAGE,
                int(page) * PAGE_BYTES,
                bytes_differing(pages[0].content(int(page)), pages[1].content(int(page))).size,
            )
            for page in found[:MOST_INSPECTED]
        ],
        not_compared=[],
        notes=["images have no state, so dmaproof did not check for a migration"],
        compare_s=compare_s,
    )


def _pages(fd: int, count: int) -> FilePages:
    runs = DataRuns(fd)
    return FilePages(Extent(fd), count, runs, lambda: absent_in_file(runs, 0, count))


def _side(path: Path, length: int) -> Side:
    return Side(
        address=str(path),
        pid=0,
        version="",
        status="",
        accelerator="other",
        in_place_bytes=length,
        copied_bytes=0,
        saved_bytes=0,
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{path} is not a regular file; expected a raw image of RAM. For a QMP socket, leave "
            "out --raw"
        )
    if is_snapshot(path):
        raise UsageError(f"{path} is a snapshot, not a raw image of RAM: leave out --raw")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)
