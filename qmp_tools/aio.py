"""Start QEMUs, migrate them and carry out proofs, in asynchronous code.

`qmp_tools.blocking` has the same for code that is not asynchronous.

::

    proof = await prove(guest="bare", tracker="dirty-ring")
    assert proof.verdict.exit_code == 0

    async with (
        start_qemu(["-machine", "q35", "-m", "64"]) as source,
        start_qemu(["-machine", "q35", "-m", "64", *INCOMING]) as destination,
    ):
        async for progress in migrate(source, destination, scenario="multifd-4"):
            print(progress.status, progress.remaining)
        outcome = await check(source, destination)

    async with attach("my QEMU", "/run/qmp.sock") as qemu:
        async for view in watch(qemu, 0.5):
            print(view.line)

When its context ends, or when this process is killed, every process that these functions started
is ended and reaped, and its files are removed. The errors are those of `dmaproof.errors`
(`UsageError`, `UntestableError`, …) and `QmpError`; each names the QEMU and quotes its message.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from types import NoneType

from dmaproof.errors import UsageError

from .arguments import AnyPath, path_of, require, words_of
from .host.run_folder import run_folder
from .host.timeout import DEFAULT_TIMEOUT_S
from .migration.dirty_rate import DirtyRates
from .migration.dirty_rate import measure as measure_dirty_rate
from .migration.migration import Limits, Migration, MigrationError, Progress
from .migration.procedure import UnsupportedScenarioError
from .migration.scenarios import find_scenario, known_scenarios
from .migration.transport import Ends
from .migration.watch import View, watch
from .proof import run as proof_run
from .proof.model import Proof
from .proof.options import ProofOptions, options_as_keywords
from .proof.resolve import resolve
from .qemu.choice import find_qemu
from .qemu.machine import INCOMING
from .qemu.opening import open_qemu as attach
from .qemu.qemu import SERIAL_PORTS, OwnedQemu, Qemu, SocketQemu, running_qemu
from .qemu.qmp import Qmp, QmpError
from .ram_check.check import check
from .ram_check.images import check_images
from .ram_check.migrated import GuestHasRunError, MigrationFailedError, NotMigratedError
from .ram_check.outcome import Check, RamDiffersError
from .ram_check.snapshot import Snapshot
from .ram_check.take import take_snapshot

__all__ = [
    "INCOMING",
    "Check",
    "DirtyRates",
    "GuestHasRunError",
    "Limits",
    "MigrationError",
    "MigrationFailedError",
    "NotMigratedError",
    "OwnedQemu",
    "Progress",
    "Proof",
    "ProofOptions",
    "Qemu",
    "Qmp",
    "QmpError",
    "RamDiffersError",
    "Snapshot",
    "SocketQemu",
    "UnsupportedScenarioError",
    "View",
    "attach",
    "check",
    "check_images",
    "known_scenarios",
    "measure_dirty_rate",
    "migrate",
    "prove",
    "start_qemu",
    "take_snapshot",
    "watch",
]


@contextlib.asynccontextmanager
async def start_qemu(
    arguments: Sequence[str] = (),
    *,
    binary: AnyPath | None = None,
    accelerator: str | None = None,
    name: str = "test",
    folder: AnyPath | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> AsyncIterator[OwnedQemu]:
    """Start a QEMU, and end it when the context ends.

    Args:
        arguments: words of QEMU's command line.
        binary: see `find_qemu`.
        accelerator: a value of QEMU's ``-accel``, such as 'tcg'; None leaves it to `arguments`.
        name: the name of the QEMU in messages and files.
        folder: the folder for logs and sockets; by default a temporary one, which is removed when
            the context ends.
        timeout_s: bounds the wait for each of QEMU's answers, in seconds.

    Raises:
        UsageError: an argument has the wrong type.
        UntestableError: no QEMU was found, or it does not start.
    """
    words = words_of("arguments", arguments)
    program = None if binary is None else str(path_of("binary", binary))
    require("accelerator", accelerator, (str, NoneType), "a name, such as 'tcg'")
    require("name", name, str, "a name")
    require("timeout_s", timeout_s, (int, float), "seconds")
    with contextlib.ExitStack() as own:
        where = own.enter_context(run_folder()) if folder is None else path_of("folder", folder)
        if accelerator is not None:
            words = ["-accel", accelerator, *words]
        async with running_qemu(
            name, find_qemu(program), [*SERIAL_PORTS, *words], where, timeout_s=timeout_s
        ) as qemu:
            yield qemu


async def migrate(
    source: Qemu, destination: Qemu, scenario: str = "unix", limits: Limits | None = None
) -> AsyncIterator[Progress]:
    """Migrate, and yield the progress; at the end the destination has loaded everything.

    The destination must have been started with `INCOMING`. Both guests are paused afterwards.

    Raises:
        UsageError: the scenario does not exist or is for proofs only, or an argument has the wrong
            type.
        UnsupportedScenarioError: a QEMU does not support the scenario.
        MigrationError: the migration failed, or took longer than the `limits` allow.
    """
    for argument, qemu in (("source", source), ("destination", destination)):
        require(argument, qemu, SocketQemu, "a QEMU from start_qemu(), or attach() with a socket")
    assert isinstance(source, SocketQemu)
    assert isinstance(destination, SocketQemu)
    require("limits", limits, (Limits, NoneType), "Limits")
    require("scenario", scenario, str, "a name")
    chosen = find_scenario(scenario)
    if not chosen.suits_any_guest:
        raise UsageError(
            f"scenario {scenario!r} works only in a proof with one of dmaproof's devices; choose "
            "another scenario, or use prove()"
        )
    with run_folder() as folder:
        migration = Migration(Ends(source.qmp, destination.qmp, folder), chosen, limits or Limits())
        await migration.start()
        await migration.release()
        async with contextlib.aclosing(migration.follow()) as precopy:
            async for progress in precopy:
                yield progress
        await migration.load()


@options_as_keywords(ProofOptions)
async def prove(options: ProofOptions) -> Proof:
    """Carry out one proof.

    Args:
        options: `ProofOptions`, or its fields as keyword arguments.

    Returns:
        The verdict, and the facts on which it is based.

    Raises:
        UsageError: an option does not exist, it cannot have the value, or options contradict each
            other.
        UntestableError: the proof came to no verdict; the message says why.

    Example::

        proof = await prove(guest="bare", tracker="dirty-ring", scenario="tls")
        assert proof.verdict.exit_code == 0, proof.verdict.sentence
    """
    return await proof_run.prove(await resolve(options))
