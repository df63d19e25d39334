"""Find the absent pages of a guest's RAM: pages that were never touched, or were discarded.

A page that was written, even with zeros, is populated. An absent page also reads as zeros, so the
content does not distinguish the two, but the kernel does. In a shared file, an absent page is a
hole (SEEK_HOLE, lseek(2)). In private memory, QEMU's process has no page of its own at the address
(/proc/PID/pagemap; Documentation/admin-guide/mm/pagemap.rst). When an absent page of private memory
is read, the kernel maps the zero page, which counts as absent.

Pages have 4 KiB. The kernel reports on the pages of the host, which may be larger.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES, div_ceil

from ..host.process_status import PROC
from .data_runs import DataRuns
from .process_memory import Mapping

PRESENT: Final = np.uint64(1 << 63)
SWAPPED: Final = np.uint64(1 << 62)
_FILE: Final = np.uint64(1 << 61)
_EXCLUSIVE: Final = np.uint64(1 << 56)
"""Flags of the entries of /proc/PID/pagemap."""
_ENTRY_BYTES: Final = 8
"""The size of an entry of /proc/PID/pagemap."""
_SYSFS: Final = Path("/sys")


@dataclass(frozen=True)
class Absent:
    """The `absent` pages, as an array of bools, one for each page.

    If not `certain`, a page that is not `absent` may have been discarded too: in memory whose pages
    are larger than 4 KiB (huge pages, or those of the host) the kernel fills in zeros around what
    is written, KSM may have merged the page, or the memory cannot be examined.
    """

    absent: NDArray[np.bool_]
    certain: bool = True


def absent_in_file(runs: DataRuns, offset: int, pages: int) -> Absent:
    """Find the holes among `pages` pages of a shared file from byte `offset` on."""
    absent = np.ones(pages, dtype=np.bool_)
    for begin, end in runs.within(offset, offset + pages * PAGE_BYTES):
        absent[(begin - offset) // PAGE_BYTES : (end - offset) // PAGE_BYTES] = False
    return Absent(absent, certain=mmap.PAGESIZE == PAGE_BYTES)


def pagemap_entries(pagemap: int, hva: int, pages: int) -> NDArray[np.uint64] | None:
    """Read the entry of each of `pages` pages from `hva` on, from an open /proc/PID/pagemap.

    Pages of 4 KiB in the same page of the host have the same entry.

    Returns:
        The entries; None if the file does not have all of them.
    """
    first, end = hva // mmap.PAGESIZE, div_ceil(hva + pages * PAGE_BYTES, mmap.PAGESIZE)
    content = os.pread(pagemap, (end - first) * _ENTRY_BYTES, first * _ENTRY_BYTES)
    if len(content) != (end - first) * _ENTRY_BYTES:
        return None
    entries = np.repeat(np.frombuffer(content, dtype=np.uint64), mmap.PAGESIZE // PAGE_BYTES)
    skipped = hva % mmap.PAGESIZE // PAGE_BYTES
    return entries[skipped : skipped + pages]


def absent_in_process(
    pid: int,
    mappings: Sequence[Mapping],
    hva: int,
    pages: int,
    *,
    proc: Path = PROC,
    sysfs: Path = _SYSFS,
) -> Absent:
    """Find the absent pages among `pages` pages of private memory of process `pid` from `hva` on.

    `proc` is the mount point of procfs; below `sysfs`, the kernel reports whether KSM merges pages.
    """
    unknown = Absent(np.zeros(pages, dtype=np.bool_), certain=False)
    length = pages * PAGE_BYTES
    mapping = next(
        (each for each in mappings if each.start <= hva and hva + length <= each.end), None
    )
    if mapping is None or mapping.shared:
        return unknown
    try:
        with (proc / str(pid) / "pagemap").open("rb", buffering=0) as pagemap:
            entries = pagemap_entries(pagemap.fileno(), hva, pages)
        huge = _has_huge_pages(proc / str(pid) / "smaps", mapping)
        merging = sysfs / "kernel/mm/ksm/pages_sharing"
        merged = int(merging.read_text()) > 0 if merging.exists() else False
    except OSError:
        return unknown
    if entries is None:
        return unknown
    present = (entries & PRESENT != 0) & (entries & _FILE == 0)
    alone = entries & _EXCLUSIVE != 0
    # A page that is mapped more than once is the zero page, or one that KSM has merged.
    undecided = merged and bool((present & ~alone).any())
    if not merged:
        present &= alone
    certain = mmap.PAGESIZE == PAGE_BYTES and not huge and not undecided
    return Absent(~(present | (entries & SWAPPED != 0)), certain)


def _has_huge_pages(smaps: Path, mapping: Mapping) -> bool:
    """Return whether a mapping has huge pages, transparent or hugetlb ones (proc_pid_smaps(5))."""
    inside = False
    with smaps.open() as lines:
        for line in lines:
            key, *values = line.split()
            if not key.endswith(":"):
                inside = key == f"{mapping.start:x}-{mapping.end:x}"
            elif inside and key in ("AnonHugePages:", "Private_Hugetlb:") and values[0] != "0":
                return True
            elif inside and key == "VmFlags:":
                return False
    return True  # the mapping has changed meanwhile, so nothing is certain
