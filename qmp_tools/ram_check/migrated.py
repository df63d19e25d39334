"""Check that two QEMUs are the sides of a completed migration, and that neither has run since.

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
"""

from __future__ import annotations

import re
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError

from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpRefusal

_BLOCKS: Final = re.compile(r"^TB count +(\d+)", re.MULTILINE)
_EXITS: Final = ("exits", "signal_exits")
"""KVM's counters. A vCPU that is stopped before its first exit leaves guest mode by a signal."""
_AFTER_SWITCHOVER: Final = ("postmigrate", "finish-migrate")
"""QEMU reports a migration as completed a moment before it sets 'postmigrate'."""
_REMEDY: Final = (
    "Start the destination with -S, or send it QMP 'stop' while it waits for the migration's data, "
    "and migrate again"
)


class NotMigratedError(UntestableError):
    """The two QEMUs are not the source and the destination of a completed migration."""


class GuestHasRunError(UntestableError):
    """A guest has run since the migration, or may have."""


async def require_paused(qemu: Qemu) -> None:
    """Require that the guest is paused.

    Raises:
        UntestableError: the guest is running.
    """
    if await qemu.status() == "running":
        raise UntestableError(
            f"{_whole_name(qemu)} is running, so its RAM changes while dmaproof reads it: pause "
            "the guest first (QMP 'stop')"
        )


async def require_migrated(source: Qemu, destination: Qemu) -> None:
    """Require that both QEMUs have been paused since a completed migration between them.

    Raises:
        UsageError: the QEMUs are given in the wrong order.
        NotMigratedError: there was no migration, or it has not completed.
        GuestHasRunError: one of the guests has run since the migration.
    """
    sent, received = [await qemu.qmp.execute("query-migrate") for qemu in (source, destination)]
    states = [await qemu.status() for qemu in (source, destination)]
    if states[1] == "postmigrate" and "ram" not in sent and _is_complete(sent):
        raise UsageError(
            f"{source.address} is the destination and {destination.address} is the source: give "
            "the source first"
        )
    if not _is_complete(sent):
        raise NotMigratedError(_incomplete(source, sent))
    if states[0] not in _AFTER_SWITCHOVER:
        raise GuestHasRunError(
            f"{_whole_name(source)} was resumed or reset after its migration (its state is "
            f"'{states[0]}', not 'postmigrate'), so its RAM may have changed since the migration: "
            "migrate again, and check before you resume or reset the source"
        )
    if states[1] == "running":
        raise GuestHasRunError(
            f"{_whole_name(destination)} is running, so its RAM has changed since the migration; "
            f"pausing it now does not undo that. {_REMEDY}"
        )
    if states[1] == "inmigrate":
        raise NotMigratedError(
            f"{_whole_name(destination)} still waits for the data of a migration: let the "
            "migration complete first"
        )
    if not _is_complete(received):
        raise NotMigratedError(_incomplete(destination, received))
    if await has_run(destination):
        raise GuestHasRunError(
            f"the guest of {_whole_name(destination)} is paused, but has run since the migration, "
            f"so its RAM has changed. {_REMEDY}"
        )


def _is_complete(migration: dict[str, Any]) -> bool:
    return migration.get("status") == "completed"


def _incomplete(qemu: Qemu, migration: dict[str, Any]) -> str:
    status = migration.get("status", "none")
    if status == "none":
        return (
            f"{_whole_name(qemu)} has not been migrated, so nothing was tested. To compare two "
            "QEMUs without a migration, use --no-migration (in the library, expect_migration=False)"
        )
    return (
        f"the migration of {_whole_name(qemu)} is '{status}', not 'completed': check again when it "
        "has completed"
    )


def _whole_name(qemu: Qemu) -> str:
    return f"{qemu.name} ({qemu.address})"


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
