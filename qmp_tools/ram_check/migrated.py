"""Whether two QEMUs are what a completed migration left behind, with nothing run since.

Only then does a comparison prove anything: two QEMUs that never migrated are equal because neither
has changed, and a guest that has run differs wherever it has written.

Measured on QEMU 7.2, 10.0 and 11.1, for precopy, postcopy and guests saved in a file:

- The source's migration is 'completed' and its run state 'postmigrate', which it leaves for good
  when it is resumed or reset.
- The destination reports its incoming migration as 'completed' too.
- A guest that has not run has no translation block (TCG), and its vCPUs never came back from guest
  mode (KVM). Both counters begin at 0 in each process, and loading a migration leaves them there.
  CPU time does not tell: a guest that ran for a moment needs no more than loading does.
"""

from __future__ import annotations

import re
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError

from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpRefusal

_BLOCKS: Final = re.compile(r"^TB count +(\d+)", re.MULTILINE)
_EXITS: Final = ("exits", "signal_exits")
"""KVM's counters. A vCPU that is stopped before it has exited leaves by a signal."""
_AFTER_SWITCHOVER: Final = ("postmigrate", "finish-migrate")
"""QEMU completes a migration a moment before it sets the first."""
_REMEDY: Final = (
    "Start the destination with -S, or send it QMP 'stop' while it waits for the migration's data, "
    "and migrate again"
)


class NotMigratedError(UntestableError):
    """The two QEMUs are not the source and the destination of a completed migration."""


class GuestHasRunError(UntestableError):
    """A guest has run since the migration, or may have."""


async def require_paused(qemu: Qemu) -> None:
    """Raise where the guest runs.

    Raises:
        UntestableError: it does.
    """
    if await qemu.status() == "running":
        raise UntestableError(
            f"{_whole_name(qemu)} is running, and so its RAM changes while it is read: pause it "
            "first (QMP 'stop')"
        )


async def require_migrated(source: Qemu, destination: Qemu) -> None:
    """Raise unless both are paused since a migration that is complete.

    Raises:
        UsageError: they are given in the wrong order.
        NotMigratedError: there was no migration, or it is not complete.
        GuestHasRunError: one of the guests has run since.
    """
    sent, received = [await q.qmp.execute("query-migrate") for q in (source, destination)]
    states = [await q.status() for q in (source, destination)]
    if states[1] == "postmigrate" and "ram" not in sent and _is_complete(sent):
        raise UsageError(
            f"{source.socket_path} is the destination's socket and {destination.socket_path} the "
            "source's: give the source first"
        )
    if not _is_complete(sent):
        raise NotMigratedError(_incomplete(source, sent))
    if states[0] not in _AFTER_SWITCHOVER:
        raise GuestHasRunError(
            f"{_whole_name(source)} was resumed or reset after its migration (it is "
            f"'{states[0]}', not 'postmigrate'), and so its RAM is no longer what was migrated: "
            "migrate again, and compare before that"
        )
    if states[1] == "running":
        raise GuestHasRunError(
            f"{_whole_name(destination)} is running, and so its RAM is no longer what arrived; to "
            f"pause it now would not undo that. {_REMEDY}"
        )
    if states[1] == "inmigrate":
        raise NotMigratedError(
            f"{_whole_name(destination)} still waits for a migration's data: let the migration "
            "complete first"
        )
    if not _is_complete(received):
        raise NotMigratedError(_incomplete(destination, received))
    if await has_run(destination):
        raise GuestHasRunError(
            f"the guest of {_whole_name(destination)} is paused, but has run since the migration, "
            f"and so its RAM is no longer what arrived. {_REMEDY}"
        )


def _is_complete(migration: dict[str, Any]) -> bool:
    return migration.get("status") == "completed"


def _incomplete(qemu: Qemu, migration: dict[str, Any]) -> str:
    status = migration.get("status", "none")
    if status == "none":
        return (
            f"{_whole_name(qemu)} has no migration behind it, so nothing was tested. If none was "
            "intended, say so: --no-migration (expect_migration=False in the library)"
        )
    return (
        f"the migration of {_whole_name(qemu)} is '{status}', not 'completed': compare when it has "
        "completed"
    )


def _whole_name(qemu: Qemu) -> str:
    return f"{qemu.name} ({qemu.socket_path})"


async def has_run(qemu: Qemu) -> bool | None:
    """Whether the guest has run in this process; None where the accelerator does not tell."""
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
    counts = [it["value"] for vcpu in answer for it in vcpu["stats"] if it["name"] in _EXITS]
    return any(counts) if counts else None
