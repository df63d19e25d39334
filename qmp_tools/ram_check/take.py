"""Take a snapshot of a guest into a file, now or at the switchover of its migration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..arguments import AnyPath, path_of
from ..host.run_folder import run_folder
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..qemu.libvirt_domain import require_local
from ..qemu.opening import AnyQemu, open_qemu
from ..qemu.qemu import Qemu
from .guest import live_guest
from .migrated import guest_state, require_not_run, require_paused
from .snapshot import Snapshot, write_failure, write_snapshot
from .snapshot_file import create
from .switchover import held_source


def _do_nothing() -> None:
    pass


async def take_snapshot(
    qemu: AnyQemu,
    file: AnyPath,
    *,
    at_switchover: bool = False,
    on_held: Callable[[], None] = _do_nothing,
    with_content: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Snapshot:
    """Take a snapshot of a guest, which `check` can compare without the guest's QEMU.

    Args:
        qemu: the QEMU, in each form that `check` takes.
        file: the path of the file for the snapshot; an existing file is replaced.
        at_switchover: whether to wait for a migration of the guest to complete. The guest may run
            until then, and its QEMU may end at the switchover. If False, the guest is paused now.
        on_held: called when the memory is held, if `at_switchover`: from then on the migration may
            begin.
        with_content: whether to save the bytes of each page that is not zero. If False, the file
            has a digest of each page, 16 bytes, and a check cannot count the bytes that differ.
        timeout_s: bounds the wait for each answer of QEMU. The wait for the switchover ends at the
            latest when QEMU ends.

    Raises:
        UsageError: `qemu` is not a QEMU, or the file cannot be written.
        MigrationFailedError: the migration failed or was cancelled.
        UntestableError: the guest runs, or its memory cannot be held or read.

    Example::

        await take_snapshot("/run/source.qmp", "source.snap")
    """
    path = path_of("file", file)
    require_local("QEMU", qemu)
    async with open_qemu("QEMU", qemu, timeout_s=timeout_s) as opened:
        with run_folder() as folder:
            if at_switchover:
                await _at_switchover(opened, folder, path, on_held, with_content=with_content)
            else:
                await _now(opened, folder, path, with_content=with_content)
    return Snapshot.read(path)


async def _now(qemu: Qemu, folder: Path, path: Path, *, with_content: bool) -> None:
    require_paused(state := await guest_state(qemu))
    with create(path) as file:
        try:
            async with live_guest(qemu, folder) as guest:
                await write_snapshot(guest, state, file, with_content=with_content)
            require_not_run(state, await guest_state(qemu))
        except BaseException:
            path.unlink(missing_ok=True)
            raise


async def _at_switchover(
    qemu: Qemu, folder: Path, path: Path, on_held: Callable[[], None], *, with_content: bool
) -> None:
    async with held_source(qemu, folder) as source:
        with create(path) as file:
            on_held()
            try:
                state = await source.wait_for_switchover()
                await write_snapshot(source.guest, state, file, with_content=with_content)
                await source.require_still_paused()
            except BaseException as error:
                write_failure(file, str(error) or "the program that waited for it was interrupted")
                raise
