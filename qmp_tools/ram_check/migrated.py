"""Check that two guests are the sides of a completed migration, and that neither has run since.

Otherwise a comparison proves nothing: two QEMUs that never migrated may be equal because neither
has changed, and a guest that has run differs wherever it has written.

Measured on QEMU 7.2, 10.0 and 11.1, for precopy, postcopy and guests saved in a file:

- The source's migration is 'completed' and its run state is 'postmigrate'. The source leaves this
  state when it is resumed or reset, and never returns to it.
- The destination reports its incoming migration as 'completed' too.
- A guest that has not run has no translation block (TCG), and its vCPUs have never exited from
  guest mode (KVM). Both counters start at 0 in each process, and loading a migration does not
  change them. CPU time does not show it: a guest that runs for a moment needs no more of it than
  the loading does.

A supervisor such as libvirt ends the source at the end of the migration. What that QEMU would have
answered is then unknown, but the destination reports that it has received everything.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError

from ..host.timeout import bounded
from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpRefusal

_BLOCKS: Final = re.compile(r"^TB count +(\d+)", re.MULTILINE)
_EXITS: Final = ("exits", "signal_exits")
"""KVM's counters. A vCPU that is stopped before its first exit leaves guest mode by a signal."""
_AFTER_SWITCHOVER: Final = ("postmigrate", "finish-migrate")
"""QEMU reports a migration as completed a moment before it sets 'postmigrate'."""
ENDED: Final = "ended"
"""The run state of a guest whose QEMU has ended; QEMU itself has no such state."""
_FAILED: Final = ("failed", "cancelled")
_LOOK_EVERY_S: Final = 0.05
_REMEDY: Final = (
    "Start the destination with -S (libvirt: virsh migrate --suspend), or send it QMP 'stop' while "
    "it waits for the migration's data, and migrate again"
)


class NotMigratedError(UntestableError):
    """The two QEMUs are not the source and the destination of a completed migration."""


class MigrationFailedError(NotMigratedError):
    """The migration that dmaproof waited for failed or was cancelled."""


class GuestHasRunError(UntestableError):
    """A guest has run since the migration, or may have."""


@dataclass(frozen=True)
class GuestState:
    """What a QEMU reports about its guest and its migration.

    `name` is the name in messages, with the address. `run_state` is that of query-status, or
    `ENDED`. `migration` is the status of query-migrate, or 'none'; `has_sent` says whether this
    QEMU was the source of that migration. `has_run` says whether the guest has run in this
    process, None if the accelerator does not report it.
    """

    name: str
    address: str
    run_state: str
    migration: str
    has_sent: bool
    has_run: bool | None


async def guest_state(qemu: Qemu) -> GuestState:
    """Return the state of `qemu`."""
    migration: dict[str, Any] = await qemu.qmp.execute("query-migrate")
    return GuestState(
        name=f"{qemu.name} ({qemu.address})",
        address=qemu.address,
        run_state=await qemu.status(),
        migration=str(migration.get("status", "none")),
        has_sent="ram" in migration,
        has_run=await has_run(qemu),
    )


def has_completed(source: GuestState) -> bool:
    """Return whether a source's migration has completed, and its guest was not resumed since."""
    return source.migration == "completed" and source.run_state in _AFTER_SWITCHOVER


def has_arrived(destination: GuestState) -> bool:
    """Return whether a destination has received a guest."""
    return destination.migration == "completed" and destination.run_state != "inmigrate"


async def migration_states(
    qemu: Qemu, state: GuestState, is_over: Callable[[GuestState], bool]
) -> AsyncIterator[GuestState]:
    """Follow a migration that runs or will begin; ignore the end of an earlier one.

    Args:
        qemu: one side of the migration.
        state: its present state.
        is_over: `has_completed` for the source, `has_arrived` for the destination.

    Yields:
        The state whenever the status of the migration has changed, and at last the state that
        `is_over`.

    Raises:
        MigrationFailedError: the migration failed or was cancelled.
        QmpError: QEMU does not answer any more.
    """
    status = state.migration
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        before, status = status, (await qemu.qmp.execute("query-migrate")).get("status", "none")
        if status == before != "completed":
            continue
        state = await guest_state(qemu)
        if status != before:
            _require_not_failed(state)
        if status != before or is_over(state):
            yield state
        if is_over(state):
            return


async def wait_for_migration(
    qemu: Qemu, is_over: Callable[[GuestState], bool], timeout_s: float
) -> None:
    """Wait until a migration of `qemu` is over; see `migration_states`.

    Raises:
        MigrationFailedError: the migration has failed or was cancelled.
        WaitTimeoutError: the migration takes longer than `timeout_s`.
    """
    state = await guest_state(qemu)

    def late() -> WaitTimeoutError:
        progress = "has not begun" if state.migration == "none" else f"is '{state.migration}'"
        return WaitTimeoutError(
            f"the migration of {state.name} {progress} after {timeout_s:g} s, not 'completed': "
            "migrate, or allow more time (--timeout)"
        )

    _require_not_failed(state)
    async with bounded(timeout_s, late):
        if not is_over(state):
            async for latest in migration_states(qemu, state, is_over):
                state = latest


def _require_not_failed(state: GuestState) -> None:
    if state.migration in _FAILED:
        raise MigrationFailedError(
            f"the migration of {state.name} is '{state.migration}', so there is nothing to compare"
        )


def require_paused(state: GuestState) -> None:
    """Require that the guest is paused.

    Raises:
        UntestableError: the guest is running.
    """
    if state.run_state == "running":
        raise UntestableError(
            f"{state.name} is running, so its RAM changes while dmaproof reads it: pause "
            "the guest first (QMP 'stop')"
        )


def require_not_run(before: GuestState, after: GuestState) -> None:
    """Require that a guest that was paused has not run between two states.

    Raises:
        GuestHasRunError: it has run, although it may be paused again.
        UntestableError: it is running.
    """
    require_paused(after)
    if has_completed(before):
        require_not_resumed(after)
    if after.has_run and before.has_run is False:
        raise GuestHasRunError(
            f"the guest of {after.name} has run while dmaproof read its RAM: migrate again, and "
            "keep the guest paused until dmaproof has ended"
        )


def require_migrated(source: GuestState, destination: GuestState) -> None:
    """Require that both guests have been paused since a completed migration between them.

    Raises:
        UsageError: the QEMUs are given in the wrong order.
        NotMigratedError: there was no migration, or it has not completed.
        GuestHasRunError: one of the guests has run since the migration.
    """
    if destination.run_state == "postmigrate":
        require_source(source)
    if source.run_state != ENDED:
        _require_completed(source)
        require_not_resumed(source)
    if destination.run_state == "running":
        raise GuestHasRunError(
            f"{destination.name} is running, so its RAM has changed since the migration; "
            f"pausing it now does not undo that. {_REMEDY}"
        )
    if destination.run_state == "inmigrate":
        raise NotMigratedError(
            f"{destination.name} still waits for the data of a migration: let the "
            "migration complete first"
        )
    _require_completed(destination)
    if destination.has_run:
        raise GuestHasRunError(
            f"the guest of {destination.name} is paused, but has run since the migration, "
            f"so its RAM has changed. {_REMEDY}"
        )


def require_source(state: GuestState) -> None:
    """Require that a QEMU that was given as the source is not a destination.

    Raises:
        UsageError: it has received a guest, and neither sent it nor run it.
    """
    if state.migration == "completed" and not state.has_sent and state.run_state != "running":
        raise UsageError(
            f"{state.address} was given as the source, but it is the destination of a completed "
            "migration: give the source first"
        )


def require_not_resumed(source: GuestState) -> None:
    """Require that the source of a completed migration has not continued since.

    Raises:
        GuestHasRunError: it was resumed or reset.
    """
    if source.run_state not in _AFTER_SWITCHOVER:
        raise GuestHasRunError(
            f"{source.name} was resumed or reset after its migration (its state is "
            f"'{source.run_state}', not 'postmigrate'), so its RAM may have changed since the "
            "migration: migrate again, and check before you resume or reset the source"
        )


def _require_completed(state: GuestState) -> None:
    if state.migration == "none":
        raise NotMigratedError(
            f"{state.name} has not been migrated, so nothing was tested. To compare two "
            "QEMUs without a migration, use --no-migration (in the library, expect_migration=False)"
        )
    if state.migration != "completed":
        raise NotMigratedError(
            f"the migration of {state.name} is '{state.migration}', not 'completed': check again "
            "when it has completed"
        )


async def has_run(qemu: Qemu) -> bool | None:
    """Return whether the guest has run in this process; None if the accelerator cannot tell."""
    if (await qemu.qmp.execute("query-kvm"))["enabled"]:
        return await _has_exited(qemu)
    blocks = _BLOCKS.search((await qemu.monitor("info jit")).replace("\r", ""))
    return int(blocks[1]) > 0 if blocks else None


async def _has_exited(qemu: Qemu) -> bool | None:
    try:
        answer = await qemu.qmp.execute(
            "query-stats", target="vcpu", providers=[{"provider": "kvm", "names": [*_EXITS]}]
        )
    except QmpRefusal:  # QEMU before 7.1, or Linux before 5.14
        return None
    counts = [
        counter["value"]
        for vcpu in answer
        for counter in vcpu["stats"]
        if counter["name"] in _EXITS
    ]
    return any(counts) if counts else None
