"""Compare all RAM after a migration, regardless of how the QEMUs were started.

No device of dmaproof takes part, so a difference is located (address, region, backend), but its
cause is not determined.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from dmaproof.errors import UsageError

from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..qemu.machine import DESTINATION, SOURCE
from ..qemu.opening import AnyQemu, open_qemu, require_openable
from ..qemu.qemu import Qemu
from .comparison import compare_guests
from .guest import Guest, LiveGuest, live_guest
from .outcome import Check
from .snapshot import Snapshot, complete_snapshot
from .snapshot_file import is_snapshot


async def check(
    source: AnyQemu | Snapshot,
    destination: AnyQemu | Snapshot,
    *,
    expect_migration: bool = True,
    resume: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Check:
    """Compare all RAM of two QEMUs after a migration.

    Both must be paused, as their migration left them.

    Args:
        source: the QEMU that the guest was migrated from: its handle, the path of a QMP socket, or
            an object that executes QMP commands, such as a QEMUMachine or a QMPClient; or a
            snapshot of it, or the path of a file with a snapshot.
        destination: the QEMU that the guest was migrated to.
        expect_migration: False to compare any two paused QEMUs, for example two that were started
            with the same options.
        resume: whether to continue the guest of the destination after the comparison.
        timeout_s: bounds the wait for each answer of a QEMU that is not given as a handle.

    Raises:
        UsageError: an argument is not a QEMU, both are the same QEMU, or they are in the wrong
            order.
        NotMigratedError: the QEMUs are not the two sides of a completed migration.
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
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(run_folder())
        guests = [
            await stack.enter_async_context(_open(side, guest, folder, timeout_s))
            for side, guest in given.items()
        ]
        outcome = await compare_guests(guests[0], guests[1], expect_migration=expect_migration)
        if resume and isinstance(guests[1], LiveGuest):
            await guests[1].qemu.qmp.execute("cont")
        return outcome


@contextlib.asynccontextmanager
async def _open(
    side: str, given: AnyQemu | Snapshot, folder: Path, timeout_s: float
) -> AsyncIterator[Guest]:
    if isinstance(given, Snapshot):
        yield given
    elif isinstance(given, (str, os.PathLike)) and Path(given).is_file():
        if not is_snapshot(Path(given)):
            raise UsageError(
                f"{side}: {given} is a file, but not a snapshot: take one with 'dmaproof "
                "snapshot', or compare two raw images of RAM with --raw"
            )
        yield await complete_snapshot(Path(given), timeout_s)
    else:
        async with (
            open_qemu(f"{side} QEMU", given, timeout_s=timeout_s) as qemu,
            live_guest(qemu, folder) as guest,
        ):
            yield guest


def _refuse_one_path(source: object, destination: object) -> None:
    if isinstance(source, (str, os.PathLike)) and isinstance(destination, (str, os.PathLike)):
        with contextlib.suppress(OSError):  # opening the path reports the problem
            if Path(source).samefile(destination):
                raise UsageError(
                    f"{source} is given for both sides: give the source and the destination"
                )


async def compare_ram(
    source_qemu: Qemu,
    destination_qemu: Qemu,
    folder: Path,
    *,
    expect_migration: bool = True,
) -> Check:
    """Compare the RAM of two QEMUs, each of which has an open QMP session; see `compare_guests`.

    QEMUs whose memory cannot be read save it in `folder`, one piece at a time.
    """
    async with (
        live_guest(source_qemu, folder) as source,
        live_guest(destination_qemu, folder) as destination,
    ):
        return await compare_guests(source, destination, expect_migration=expect_migration)
