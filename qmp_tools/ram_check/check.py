"""Compare all RAM after a migration, regardless of how the QEMUs were started.

No device of dmaproof takes part, so a difference is located (address, region, backend), but its
cause is not determined.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError

from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S, wait_until
from ..qemu.attachment import NoListenerError
from ..qemu.libvirt_domain import require_local
from ..qemu.machine import DESTINATION, SOURCE
from ..qemu.opening import AnyQemu, open_qemu, require_openable, socket_path
from ..qemu.qemu import Qemu
from .comparison import compare_guests
from .guest import Guest, LiveGuest, live_guest
from .migrated import (
    ENDED,
    guest_state,
    has_arrived,
    has_completed,
    require_source,
    wait_for_migration,
)
from .outcome import Check
from .snapshot import Snapshot, complete_snapshot
from .snapshot_file import is_snapshot

_LOOK_EVERY_S: Final = 0.05


async def check(
    source: AnyQemu | Snapshot,
    destination: AnyQemu | Snapshot,
    *,
    expect_migration: bool = True,
    wait: bool = False,
    resume: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Check:
    """Compare all RAM of two QEMUs after a migration.

    Both must be paused, as their migration left them.

    Args:
        source: the QEMU that the guest was migrated from: its handle, the path of a QMP socket, the
            URI of a libvirt domain, or an object that executes QMP commands, such as a QEMUMachine
            or a QMPClient; or a snapshot of it, or the path of a file with a snapshot.
        destination: the QEMU that the guest was migrated to.
        expect_migration: False to compare any two paused QEMUs, for example two that were started
            with the same options.
        wait: whether to wait until the sockets of the QEMUs exist and the migration has completed.
            If False, the source's migration must have completed; the destination may still be
            about to complete it.
        resume: whether to continue the guest of the destination after the comparison.
        timeout_s: bounds the wait for each answer of a QEMU that is not given as a handle, and with
            `wait` for the end of the migration.

    Raises:
        UsageError: an argument is not a QEMU, both are the same QEMU, or they are in the wrong
            order.
        NotMigratedError: the QEMUs are not the two sides of a completed migration;
            `MigrationFailedError` if it failed during the wait.
        GuestHasRunError: a guest has run since the migration, or pages differ and it may have run.
        UntestableError: the sizes or maps differ, or memory cannot be read.

    Example::

        (await check("/run/source.qmp", "/run/destination.qmp")).require_equal()
    """
    given = {SOURCE: source, DESTINATION: destination}
    for side, guest in given.items():
        if not isinstance(guest, Snapshot):
            require_openable(side, guest)
    _refuse_one_path(source, destination)
    if wait and not expect_migration:
        raise UsageError(
            "--wait and --no-migration (wait and expect_migration=False) exclude each other"
        )
    async with contextlib.AsyncExitStack() as stack:
        opening = _Opening(stack.enter_context(run_folder()), timeout_s, wait=wait)
        before = await stack.enter_async_context(opening.source(source))
        after = await stack.enter_async_context(opening.destination(destination, before))
        if resume and not isinstance(after, LiveGuest):
            raise UsageError("the destination is a snapshot, so there is no guest to resume")
        outcome = await compare_guests(before, after, expect_migration=expect_migration)
        if resume and isinstance(after, LiveGuest):
            await after.qemu.qmp.execute("cont")
        return outcome


@dataclass(frozen=True)
class _Opening:
    """Opens the guests of both sides, whose QEMUs may save memory in `folder`."""

    folder: Path
    timeout_s: float
    wait: bool

    def source(self, given: AnyQemu | Snapshot) -> AbstractAsyncContextManager[Guest]:
        return self._guest(SOURCE, given, self._let_complete)

    def destination(
        self, given: AnyQemu | Snapshot, source: Guest
    ) -> AbstractAsyncContextManager[Guest]:
        return self._guest(DESTINATION, given, lambda qemu: self._let_arrive(qemu, source))

    @contextlib.asynccontextmanager
    async def _guest(
        self,
        side: str,
        given: AnyQemu | Snapshot,
        let_migrate: Callable[[Qemu], Awaitable[None]],
    ) -> AsyncIterator[Guest]:
        """Open the guest of a side; `let_migrate` waits for its migration if there is a QEMU."""
        async with self._snapshot(side, given) as snapshot:
            if snapshot:
                yield snapshot
                return
        async with self._qemu(side, given) as qemu:
            await let_migrate(qemu)
            async with live_guest(qemu, self.folder) as guest:
                yield guest

    @contextlib.asynccontextmanager
    async def _snapshot(
        self, side: str, given: AnyQemu | Snapshot
    ) -> AsyncIterator[Snapshot | None]:
        """Yield the snapshot that was given, or that is in the file; None if it is a QEMU."""
        if isinstance(given, Snapshot):
            yield given
            return
        if self.wait and (path := socket_path(given)):
            await wait_until(
                path.exists,
                self.timeout_s,
                lambda: WaitTimeoutError(
                    f"{side}: {path} does not exist after {self.timeout_s:g} s: start QEMU, take "
                    "the snapshot, or allow more time (--timeout)"
                ),
            )
        if not isinstance(given, (str, os.PathLike)) or not Path(given).is_file():
            yield None
            return
        if not os.access(given, os.R_OK):
            raise UntestableError(f"{side}: this user may not read {given}")
        if not is_snapshot(Path(given)):
            raise UsageError(
                f"{side}: {given} is a file, but not a snapshot: take one with 'dmaproof "
                "snapshot', or compare two raw images of RAM with --raw"
            )
        async with complete_snapshot(Path(given), self.timeout_s) as snapshot:
            yield snapshot

    @contextlib.asynccontextmanager
    async def _qemu(self, side: str, given: AnyQemu | Snapshot) -> AsyncIterator[Qemu]:
        assert not isinstance(given, Snapshot)
        require_local(side, given)
        async with contextlib.AsyncExitStack() as stack:
            deadline_s = time.monotonic() + self.timeout_s
            while True:
                qemu = open_qemu(f"{side} QEMU", given, timeout_s=self.timeout_s)
                try:
                    opened = await stack.enter_async_context(qemu)
                    break
                except NoListenerError:  # the socket of a QEMU that was killed
                    if not self.wait or time.monotonic() > deadline_s:
                        raise
                    await asyncio.sleep(_LOOK_EVERY_S)
            yield opened

    async def _let_complete(self, qemu: Qemu) -> None:
        if self.wait:
            require_source(await guest_state(qemu))
            await wait_for_migration(qemu, has_completed, self.timeout_s)

    async def _let_arrive(self, qemu: Qemu, source: Guest) -> None:
        """Wait for a destination that is about to complete the migration of the source.

        It does so a moment after the source, which has sent everything.
        """
        if not self.wait:
            sent, state = await source.state(), await guest_state(qemu)
            has_sent_all = has_completed(sent) or sent.run_state == ENDED
            is_loading = state.run_state == "inmigrate" and state.migration != "none"
            if not (has_sent_all and is_loading):
                return
        await wait_for_migration(qemu, has_arrived, self.timeout_s)


def _refuse_one_path(source: object, destination: object) -> None:
    if isinstance(source, (str, os.PathLike)) and isinstance(destination, (str, os.PathLike)):
        with contextlib.suppress(OSError):  # opening the path reports the problem
            if Path(source).samefile(destination):
                raise UsageError(
                    f"{source} is given for both sides: give the source and the destination"
                )
