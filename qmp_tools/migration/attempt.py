"""One migration of a pair of QEMUs, from its preparation until both guests are paused.

The steps of a scenario work on it, and it keeps what they learn: when every page had been sent,
whether the migration ended before it was allowed to, and the RAM that is to be compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import cached_property

from ..memory.ram import RamFile, copied, ram_files, slots_of
from .log_watch import LogWatch, used_rings
from .migration import Limits, Migration, Progress
from .pair import QemuPair
from .procedure import Procedure
from .progress_log import OnProgress
from .vhost_log import vhost_log


class Attempt:
    """A migration of `pair` as `procedure` says, and what its steps find out.

    `joined` is set by a scenario whose destination answers on QMP only during the migration (see
    `Ends`). `all_sent_ns` (CLOCK_MONOTONIC) is when QEMU was seen to have sent every page, None if
    it was not. `ended_early` says whether the migration ended, if it did, before it was allowed to.
    """

    def __init__(
        self,
        pair: QemuPair,
        procedure: Procedure,
        limits: Limits,
        on_progress: OnProgress,
        *,
        ring_addresses_are_physical: bool = True,
        watches_log: bool = False,
    ) -> None:
        """Plan a migration; nothing is done yet.

        Args:
            pair: the QEMUs, started or about to be.
            procedure: the scenario.
            limits: bounds of the migration.
            on_progress: takes each progress of it.
            ring_addresses_are_physical: False behind an IOMMU, where QEMU reports bus addresses.
            watches_log: whether QEMU's vhost log is the only evidence of what the device reports.
        """
        self.pair = pair
        self.joined: Callable[[], Awaitable[None]] | None = None
        self.all_sent_ns: int | None = None
        self.ended_early = False
        self.log_watch: LogWatch | None = None
        self._procedure = procedure
        self._limits = limits
        self._on_progress = on_progress
        self._ring_addresses_are_physical = ring_addresses_are_physical
        self._watches_log = watches_log
        self._source_ram: Sequence[RamFile] | None = None
        self._destination_ram: Sequence[RamFile] | None = None
        self._kept = contextlib.AsyncExitStack()

    @cached_property
    def migration(self) -> Migration:
        """The migration over QMP; both QEMUs must have been launched."""
        return Migration(
            replace(self.pair.ends(), joined=self.joined),
            self._procedure,
            self._limits,
            device_lacks_pagefault=self.pair.device.lacks_pagefault,
        )

    async def follow(self) -> AsyncIterator[Progress]:
        """The migration's progress until it is over, reported; the guest's progress is waited for.

        Raises:
            MigrationError: it failed, or took longer than its time.
        """
        once = 0
        async for progress in self.migration.follow():
            self._on_progress(progress)
            if once < (once := self.once_pages()):
                self.migration.restart_timeout()
            yield progress

    def once_pages(self) -> int:
        """How many of its write-once pages the guest has had read into."""
        guest = self.pair.source_guest
        return max(guest.number("write-once-done", "pages"), guest.number("progress", "write_once"))

    # The RAM that is compared ---------------------------------------------------------------------

    async def copy_source_ram(self) -> None:
        """Pause the source, and copy its RAM: that of this moment is compared.

        Raises:
            UntestableError: it cannot be had.
        """
        await self.pair.source.qmp.execute("stop")
        async with ram_files(self.pair.source) as files:
            self._source_ram = self._kept.enter_context(copied(files))

    async def open_destination_ram(self) -> None:
        """Open the destination's RAM before it can end, as it does where it refuses a device.

        Raises:
            UntestableError: it cannot be had.
        """
        files = ram_files(self.pair.destination)
        self._destination_ram = await self._kept.enter_async_context(files)

    @property
    def has_destination_ram(self) -> bool:
        """Whether the destination's RAM can still be read when its QEMU has ended."""
        return self._destination_ram is not None

    @contextlib.asynccontextmanager
    async def source_ram(self) -> AsyncIterator[Sequence[RamFile]]:
        """The source's RAM as it is now, or as it was when it was copied."""
        if self._source_ram is not None:
            yield self._source_ram
            return
        async with ram_files(self.pair.source) as files:
            yield files

    @contextlib.asynccontextmanager
    async def destination_ram(self) -> AsyncIterator[Sequence[RamFile]]:
        """The destination's RAM."""
        if self._destination_ram is not None:
            yield self._destination_ram
            return
        async with ram_files(self.pair.destination) as files:
            yield files

    # QEMU's vhost log -----------------------------------------------------------------------------

    async def watch_log(self) -> None:
        """Watch QEMU's vhost log, where nothing else tells what the device has reported."""
        if not self._watches_log:
            return
        source = self.pair.source
        with vhost_log(source.pid, source.name, os.O_RDWR) as log:
            if log is None:  # the migration is over already
                return
            rings = await used_rings(source.qmp) if self._ring_addresses_are_physical else []
            async with ram_files(source) as files:
                slots = [slot for ram in files for slot in await slots_of(source, ram)]
                self.log_watch = LogWatch(log, files, slots, rings)

    def let_go_of_log(self) -> None:
        """Take no more bits from the log; go on looking at it."""
        if self.log_watch is not None:
            self.log_watch.let_go()

    def end_log_watch(self) -> None:
        """Look at the log no more."""
        if self.log_watch is not None:
            self.log_watch.end()

    async def end(self) -> None:
        """Release the log and the RAM that was kept."""
        self.end_log_watch()
        await self._kept.aclose()
