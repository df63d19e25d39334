"""Migrations of a guest whose memory was resized, or that gives memory back while it migrates.

A memory balloon and virtio-mem discard what the guest gives back: QEMU punches a hole into the file
of the source's RAM. The destination may still have what was sent before. QEMU need not send such a
page again, because the guest has given up its content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UsageError
from dmaproof.units import PAGE_BYTES

from ...guest.channel import DECLARE
from ...guest.drivers import BALLOON, LinuxNeeds
from ...memory.absent_pages import absent_in_file
from ...memory.data_runs import DataRuns
from ...memory.ram import RamFile
from ...qemu.machine import MIB, Hardware
from ...qemu.memory_backend import MemoryBackend
from ..attempt import Attempt
from ..migration import parse_progress
from ..pair import QemuPair
from .base import Scenario

_BALLOON: Final = "virtio-balloon-pci,id=balloon"
_PLUGGED_BYTES: Final = 128 * MIB
"""The size of a memory block of Linux, which virtio-mem plugs as a whole or in parts."""
_SPARE_PAGES: Final = 8192
"""Linux frees these pages when QEMU has sent them. It reports free blocks of 2 MiB or 4 MiB."""
_SPARE: Final = f"spare={_SPARE_PAGES}"
_READ_PAGES: Final = 1024
"""The pages of RAM that are read at a time."""
_BALLOON_BYTES: Final = 64 * MIB
"""Linux's default RAM has more free memory than this besides the workload's pages."""


class VirtioMem(Scenario):
    """Memory is plugged by virtio-mem before each of two migrations, and unplugged once."""

    name = "virtio-mem"
    summary = "The guest migrates there and back; virtio-mem plugs memory before, and unplugs some"
    migrations = 2
    added = Hardware(resizable_bytes=2 * _PLUGGED_BYTES)
    linux_needs = LinuxNeeds(("virtio_pci", "virtio_mem"))

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the source, plug memory, and start a destination."""
        await pair.guarded(pair.start_source())
        await pair.guarded(pair.boot())
        await pair.guarded(pair.resize_memory(_PLUGGED_BYTES))
        await pair.guarded(pair.use_new_memory("memory of virtio-mem"))
        await super().start_return(pair)

    async def start_return(self, pair: QemuPair) -> None:
        """Plug more memory, unplug as much again, and start a new destination."""
        await pair.guarded(pair.resize_memory(2 * _PLUGGED_BYTES))
        await pair.guarded(pair.use_new_memory("memory of virtio-mem"))
        await pair.guarded(pair.resize_memory(_PLUGGED_BYTES))
        await super().start_return(pair)


class Nvdimm(Scenario):
    """The guest's write-once pages are in an NVDIMM."""

    name = "nvdimm"
    summary = "The device writes into persistent memory (an NVDIMM) of the guest, which migrates"
    added = Hardware(machine_options=",nvdimm=on", nvdimm_bytes=_PLUGGED_BYTES)

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the QEMUs, and have the guest put its write-once pages into the NVDIMM."""
        await super().start(pair)
        await pair.guarded(pair.use_new_memory("the NVDIMM"))


class Balloon(Scenario):
    """The guest has given memory to a balloon."""

    name = "balloon"
    summary = "The guest has given 64 MiB to a memory balloon (virtio-balloon), and migrates"
    added = Hardware(qemu_arguments=("-device", _BALLOON))
    linux_needs = LinuxNeeds(BALLOON.modules)

    is_repeatable = False

    async def start(self, pair: QemuPair) -> None:
        """Start the QEMUs, and inflate the balloon."""
        await super().start(pair)
        await pair.guarded(pair.inflate_balloon(_BALLOON_BYTES))


class FreePageReporting(Scenario):
    """The guest reports its free pages while it migrates, and QEMU discards them."""

    name = "free-page-reporting"
    summary = "The guest reports free pages, which QEMU discards (virtio-balloon), and migrates"
    added = Hardware(qemu_arguments=("-device", f"{_BALLOON},free-page-reporting=on"))
    linux_needs = LinuxNeeds(BALLOON.modules, (_SPARE,))
    exercised_by = "discarded pages"

    is_repeatable = False

    async def prepare(self, attempt: Attempt) -> None:
        """Keep the RAM of both sides open; the discarded pages become holes in the source's."""
        await super().prepare(attempt)
        self._source_ram = await attempt.open_source_ram()
        async with attempt.destination_ram() as files:  # open until the end of the migration
            self._destination_ram = files

    def is_exercised_in(self, answer: Mapping[str, Any]) -> bool:
        """Return whether QEMU has discarded most of the pages that the guest has freed.

        Linux also reports memory that is free since it booted, most of which contains only zeros.
        So only a page whose old content is at the destination counts.
        """
        if parse_progress(dict(answer)).syncs < 2:
            return False
        sides = zip(self._source_ram, self._destination_ram, strict=True)
        discarded = sum(
            int((_holes(source) & _with_content(destination)).sum())
            for source, destination in sides
        )
        return discarded > _SPARE_PAGES // 2

    def require_memory(self, backend: MemoryBackend) -> None:
        """Refuse huge pages, in which a discarded page is not a hole.

        Raises:
            UsageError: the memory has huge pages.
        """
        if backend.has_huge_pages:
            raise UsageError(
                f"--scenario {self.name}: with huge pages, dmaproof cannot tell the pages that the "
                "guest gave back from lost ones; use another --memory-backend"
            )

    def given_back(self, differing: NDArray[np.int64], source: RamFile) -> NDArray[np.bool_]:
        """Return which pages are holes. A page that was written since then is compared."""
        return _holes(source)[differing]


def _holes(ram: RamFile) -> NDArray[np.bool_]:
    """Return which pages of the file are holes."""
    return absent_in_file(DataRuns(ram.fd), 0, ram.pages).absent


def _with_content(ram: RamFile) -> NDArray[np.bool_]:
    """Return which pages of the file contain more than zeros; read(2) fills no hole."""
    found = np.zeros(ram.pages, bool)
    for first in range(0, ram.pages, _READ_PAGES):
        content = os.pread(ram.fd, _READ_PAGES * PAGE_BYTES, first * PAGE_BYTES)
        words = np.frombuffer(content, np.uint64).reshape(-1, PAGE_BYTES // 8)
        found[first : first + len(words)] = words.any(axis=1)
    return found


class FreePageHint(Scenario):
    """The guest says which of its pages are free, and QEMU does not send them."""

    name = "free-page-hint"
    summary = "QEMU skips pages that the guest says are free (virtio-balloon), and migrates"
    added = Hardware(
        qemu_arguments=(
            *("-object", "iothread,id=balloon-thread"),
            *("-device", f"{_BALLOON},free-page-hint=on,iothread=balloon-thread"),
        )
    )
    # The balloon's driver allocates the free pages. Linux must not fill them with zeros then: such
    # pages are equal at the destination, whether or not QEMU has sent them.
    linux_needs = LinuxNeeds(BALLOON.modules, (_SPARE,), kernel_options="init_on_alloc=0")
    exercised_by = "skipped pages"
    skips_free_pages = True

    is_repeatable = False

    async def prepare(self, attempt: Attempt) -> None:
        """Have the guest free pages, and declare the pages that may be free."""
        await super().prepare(attempt)
        await attempt.pair.source_guest.ask(
            DECLARE, "declared", "declared the pages that it may write itself"
        )

    def is_exercised_in(self, answer: Mapping[str, Any]) -> bool:
        """Return whether QEMU has begun a second pass, but not sent as many pages as RAM has.

        QEMU counts each page that it sends, also one that contains only zeros.
        """
        progress = parse_progress(dict(answer))
        if progress.syncs < 2 or progress.total is None or progress.page_bytes is None:
            return False
        pages = progress.total // progress.page_bytes
        return pages - progress.pages_sent > _SPARE_PAGES // 2
