"""One migration of a pair of QEMUs, from its preparation until both guests are paused.

The steps of a scenario work on an `Attempt`. The `Attempt` keeps what the steps find out: when
every page had been sent, whether the migration ended too early, and the RAM to compare.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property

from dmaproof.errors import WaitTimeoutError

from ..host.timeout import wait_until
from ..memory.ram import RamFile, copied, ram_files, slots_of
from .log_watch import LogWatch, used_rings
from .migration import Limits, Migration, Progress
from .pair import QemuPair
from .procedure import Procedure
from .progress_log import OnProgress
from .vhost_log import vhost_log


class Attempt:
    """A migration of `pair` by `procedure`, and what its steps find out.

    A scenario sets `joined` if its destination answers on QMP only during the migration (see
    `Ends`). `all_sent_ns` (CLOCK_MONOTONIC) is when dmaproof saw that QEMU had sent every page;
    None if dmaproof has not seen that. `ended_early` is True as long as the end of the migration
    would be too early. `discarded_bits` has the addresses (in bytes) of the pages whose bits QEMU
    left in the log of a device that was killed.
    """

    def __init__(
        self,
        pair: QemuPair,
        procedure: Procedure,
        limits: Limits,
        on_progress: OnProgress,
        *,
        has_readable_rings: bool = True,
        watches_log: bool = False,
    ) -> None:
        """Plan a migration, without starting anything.

        Args:
            pair: the QEMUs, started or about to be started.
            procedure: the scenario.
            limits: the bounds of the migration.
            on_progress: called with each progress report of the migration.
            has_readable_rings: whether each used ring has an index in RAM, at an address that QEMU
                reports.
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
        self._has_readable_rings = has_readable_rings
        self._watches_log = watches_log
        self._watched_log = 0
        self.discarded_bits: Collection[int] = ()
        self._source_ram: Sequence[RamFile] | None = None
        self._destination_ram: Sequence[RamFile] | None = None
        self._kept = contextlib.AsyncExitStack()

    @cached_property
    def migration(self) -> Migration:
        """The migration over QMP. Both QEMUs must have been launched."""
        return Migration(
            replace(self.pair.ends(), joined=self.joined),
            self._procedure,
            self._limits,
        )

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield and report the migration's progress until the migration is over.

        Progress of the guest restarts the migration's timeout.

        Raises:
            MigrationError: the migration failed or timed out.
        """
        used = 0
        async for progress in self.migration.follow():
            self._on_progress(progress)
            if used < (used := self.used_write_once_pages()):
                self.migration.restart_timeout()
            yield progress

    def used_write_once_pages(self) -> int:
        """Return how many of its write-once pages the guest has used."""
        guest = self.pair.source_guest
        return max(guest.number("write-once-done", "pages"), guest.number("progress", "write_once"))

    # The RAM that is compared ---------------------------------------------------------------------

    async def copy_source_ram(self) -> None:
        """Pause the source and copy its RAM, which is compared with the destination's later.

        Raises:
            UntestableError: the RAM cannot be read.
        """
        await self.pair.source.qmp.execute("stop")
        async with ram_files(self.pair.source) as files:
            self._source_ram = self._kept.enter_context(copied(files))

    async def open_source_ram(self) -> Sequence[RamFile]:
        """Open the source's RAM until the end of the migration.

        Raises:
            UntestableError: the RAM cannot be read.
        """
        return await self._kept.enter_async_context(ram_files(self.pair.source))

    async def open_destination_ram(self) -> None:
        """Open the destination's RAM early: a QEMU that refuses a device's state ends.

        Raises:
            UntestableError: the RAM cannot be read.
        """
        files = ram_files(self.pair.destination)
        self._destination_ram = await self._kept.enter_async_context(files)

    @property
    def has_destination_ram(self) -> bool:
        """Whether the destination's RAM can still be read after its QEMU has ended."""
        return self._destination_ram is not None

    @contextlib.asynccontextmanager
    async def source_ram(self) -> AsyncIterator[Sequence[RamFile]]:
        """Open the copy of the source's RAM if there is one, else the source's RAM itself."""
        if self._source_ram is not None:
            yield self._source_ram
            return
        async with ram_files(self.pair.source) as files:
            yield files

    @contextlib.asynccontextmanager
    async def destination_ram(self) -> AsyncIterator[Sequence[RamFile]]:
        """Open the destination's RAM."""
        if self._destination_ram is not None:
            yield self._destination_ram
            return
        async with ram_files(self.pair.destination) as files:
            yield files

    # QEMU's vhost log -----------------------------------------------------------------------------

    async def watch_log(self) -> None:
        """Watch QEMU's vhost log if it is the only evidence of what the device has reported."""
        if not self._watches_log:
            return
        source = self.pair.source
        with vhost_log(source.pid, source.name, os.O_RDWR) as log:
            if log is None:  # the migration has ended already
                return
            rings = await used_rings(source.qmp) if self._has_readable_rings else []
            async with ram_files(source) as files:
                slots = [slot for ram in files for slot in await slots_of(source, ram)]
                self.log_watch = LogWatch(log, files, slots, rings)
                self._watched_log = os.fstat(log).st_ino

    async def watch_new_log(self) -> None:
        """Watch the log that QEMU makes when the restarted device has been started.

        Raises:
            WaitTimeoutError: QEMU does not start the device.
        """
        old = self.log_watch
        if old is None:
            return
        source = self.pair.source

        async def is_new() -> bool:
            with vhost_log(source.pid, source.name, os.O_RDWR) as log:
                return log is not None and os.fstat(log).st_ino != self._watched_log

        def late() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"{source.name} has not started the device again within "
                f"{self._limits.timeout_s:g} s after its back end was killed and restarted"
            )

        await wait_until(is_new, self._limits.timeout_s, late)
        self.discarded_bits = frozenset(old.evidence().late_bits)
        await self.watch_log()

    def release_log(self) -> None:
        """Take no more bits from the log, but continue to watch it."""
        if self.log_watch is not None:
            self.log_watch.release()

    def end_log_watch(self) -> None:
        """Stop watching the log."""
        if self.log_watch is not None:
            self.log_watch.end()

    async def end(self) -> None:
        """Release the log and the RAM."""
        self.end_log_watch()
        await self._kept.aclose()
