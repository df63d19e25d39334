"""Take the snapshot of a source at the end of its migration, even if its QEMU ends then.

A supervisor such as libvirt ends the source as soon as the migration has completed. The memory is
therefore opened and held (`exit_hold`) before the migration begins. Nothing changes it after the
switchover: the guest is paused, and is not resumed if the migration succeeds. Whether it succeeded
is known from QEMU, or later from the destination.

The physical map is read again whenever the status of the migration changes, because the guest may
have changed the map meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmaproof.errors import UntestableError

from ..host.exit_hold import ExitHold, HoldRefusedError, exit_hold
from ..host.process_status import tracer_of
from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpError
from .guest import LiveGuest, live_guest
from .migrated import (
    ENDED,
    GuestState,
    guest_state,
    has_completed,
    migration_states,
    require_not_resumed,
)


@contextlib.asynccontextmanager
async def held_source(qemu: Qemu, folder: Path) -> AsyncIterator[HeldSource]:
    """Hold the memory of `qemu`, whose migration has not completed yet, until the context ends.

    `folder` is for files that QEMU has to write.

    Raises:
        UntestableError: the memory cannot be held, or the migration has already completed.
    """
    async with contextlib.AsyncExitStack() as stack:
        source = HeldSource(qemu, folder, await guest_state(qemu))
        stack.push_async_callback(source.close)
        await source.open()
        source.require_holdable()
        try:
            hold = await stack.enter_async_context(exit_hold(qemu.pid))
        except HoldRefusedError as error:
            raise UntestableError(
                f"cannot hold the memory of {qemu.name} (process {qemu.pid}): {error.strerror}. "
                f"{_remedy(qemu.pid)}"
            ) from None
        source.hold = hold
        yield source


def _remedy(pid: int) -> str:
    if tracer := tracer_of(pid):
        return (
            f"Process {tracer} traces it already (another 'dmaproof snapshot', gdb or strace): end "
            "that one first"
        )
    return "Run dmaproof as root (with CAP_SYS_PTRACE)"


class HeldSource:
    """The source of a migration, whose memory is held. `guest` is its guest."""

    guest: LiveGuest
    hold: ExitHold

    def __init__(self, qemu: Qemu, folder: Path, state: GuestState) -> None:
        self._qemu = qemu
        self._folder = folder
        self._last = state
        self._opened = contextlib.AsyncExitStack()

    async def close(self) -> None:
        """Close the memory."""
        await self._opened.aclose()

    async def open(self) -> None:
        """Read the physical map, and open the memory."""
        async with contextlib.AsyncExitStack() as stack:
            guest = await stack.enter_async_context(live_guest(self._qemu, self._folder))
            await self._opened.aclose()
            self.guest, self._opened = guest, stack.pop_all()

    def require_holdable(self) -> None:
        """Require that the memory can be held, and that it is not too late.

        Raises:
            UntestableError: it cannot.
        """
        if has_completed(self._last):
            raise UntestableError(
                f"{self._last.name} has already completed a migration: take the snapshot without "
                "--at-switchover"
            )
        if self.guest.facts.saved_bytes:
            raise UntestableError(
                f"this user may not read the memory of {self._qemu.name} (process "
                f"{self._qemu.pid}), so the memory cannot be held until the switchover: run "
                "dmaproof as root (with CAP_SYS_PTRACE), on QEMU's host"
            )

    async def wait_for_switchover(self) -> GuestState:
        """Wait until the migration has completed or QEMU ends; return the last known state.

        Raises:
            MigrationFailedError: the migration failed or was cancelled.
            UntestableError: the memory is not held any more.
        """
        following = asyncio.create_task(self._follow())
        ending = asyncio.create_task(self.hold.ended())
        try:
            await asyncio.wait((following, ending), return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                try:
                    await following
                    return self._last
                except QmpError:  # QEMU is about to end
                    await ending
            if not ending.result():
                raise UntestableError(
                    f"the memory of {self._qemu.name} (process {self._qemu.pid}) is not held any "
                    "more: the process with which dmaproof traced QEMU has ended"
                )
            return replace(self._last, run_state=ENDED)
        finally:
            await _cancel(following, ending)

    async def require_still_paused(self) -> None:
        """Require that the source was not resumed since the switchover, if QEMU still answers.

        A QEMU that has ended does not answer, but libvirt may not say so as long as it is held.

        Raises:
            GuestHasRunError: it was resumed or reset.
        """
        asking = asyncio.create_task(guest_state(self._qemu))
        ending = asyncio.create_task(self.hold.ended())
        try:
            await asyncio.wait((asking, ending), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                with contextlib.suppress(QmpError):  # QEMU has ended
                    require_not_resumed(await asking)
        finally:
            await _cancel(asking, ending)

    async def _follow(self) -> None:
        """Follow a migration until it has completed.

        Raises:
            MigrationFailedError: the migration failed or was cancelled.
            QmpError: QEMU does not answer any more.
        """
        async for state in migration_states(self._qemu, self._last, has_completed):
            self._last = state
            await self.open()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
