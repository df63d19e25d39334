"""Start QEMUs, migrate them and carry out proofs, in code that is not asynchronous.

`qmp_tools.aio` has the same for asynchronous code.

::

    with Environment() as environment:
        pair = environment.pair(["-machine", "q35", "-m", "256"])
        pair.migrate()
        assert environment.check(pair.source, pair.destination).exit_code == 0

    with Environment() as environment:
        proof = environment.proof(guest="bare", tracker="dirty-ring")
        proof.migrate()
        assert proof.verdict().verdict.exit_code == 0

When the context of an `Environment` ends, also by an exception, the environment ends and reaps
every process that it started, and removes its files. To keep the logs, copy them before that: see
`Environment.logs`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dmaproof.errors import UsageError

from . import aio
from .arguments import AnyPath, require, words_of
from .devices.device import AttachedDevice
from .host.loop_thread import LoopThread
from .host.run_folder import room_in, run_folder
from .host.timeout import DEFAULT_TIMEOUT_S
from .migration.migration import Limits
from .proof import resolve
from .proof.model import Migrated, Proof
from .proof.options import ProofOptions, options_as_keywords, options_as_keywords_of_method
from .proof.run import ProofRun, proof_run
from .qemu.borrowed_monitor import is_asynchronous
from .qemu.machine import DESTINATION, INCOMING, SOURCE
from .qemu.opening import AnyQemu
from .qemu.qemu import OwnedQemu
from .ram_check.outcome import Check
from .ram_check.snapshot import Snapshot

__all__ = [
    "Environment",
    "Pair",
    "RunningQemu",
    "StepwiseProof",
    "check",
    "check_images",
    "prove",
    "take_snapshot",
]

G = TypeVar("G", bound=AnyQemu | Snapshot)
T = TypeVar("T")


@dataclass(frozen=True)
class RunningQemu:
    """A QEMU that an `Environment` has started.

    `qemu` is the handle for asynchronous code, such as `aio.check`: see `Environment.run`.
    """

    qemu: OwnedQemu
    _loop: LoopThread

    @property
    def name(self) -> str:
        """The name of this QEMU in messages, such as 'source QEMU'."""
        return self.qemu.name

    @property
    def pid(self) -> int:
        """The process id."""
        return self.qemu.pid

    @property
    def version(self) -> str:
        """QEMU's version, and that of its package if there is one: '7.2.22 Debian …'."""
        return self.qemu.version

    @property
    def socket_path(self) -> Path:
        """A QMP socket of this QEMU that is free for another client."""
        return self.qemu.socket_path

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a QMP command; underscores in the arguments' names become hyphens.

        Raises:
            QmpError: QEMU refused the command, has ended, or does not answer.
            UsageError: the command is not a string.
        """
        require("command", command, str, "the name of a QMP command")
        return self._loop.run(self.qemu.qmp.execute(command, **arguments))

    def status(self) -> str:
        """Return the run state, such as 'running', 'paused' or 'postmigrate'.

        Raises:
            QmpError: QEMU has ended, or does not answer.
        """
        return self._loop.run(self.qemu.status())

    def monitor(self, command: str) -> str:
        """Return what the human monitor prints for `command`, such as 'info mtree -f'.

        Raises:
            QmpError: QEMU has ended, or does not answer.
            UsageError: the command is not a string.
        """
        require("command", command, str, "a command of the human monitor")
        return self._loop.run(self.qemu.monitor(command))

    def end(self) -> None:
        """End this QEMU and reap its process, before the environment ends."""
        self._loop.run(self.qemu.end())


@dataclass(frozen=True)
class Pair:
    """A source, and a destination that waits for its migration and stays paused afterwards."""

    source: RunningQemu
    destination: RunningQemu
    _environment: Environment

    def migrate(self, scenario: str = "unix", *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Migrate by one of the `known_scenarios`; both guests are paused afterwards.

        Args:
            scenario: the name of the scenario.
            timeout_s: bounds each wait, such as that for the end of the migration, in seconds.

        Raises:
            UsageError: the scenario does not exist or is for proofs only, or an argument has the
                wrong type.
            UnsupportedScenarioError: a QEMU does not support the scenario.
            MigrationError: the migration failed, or took longer than `timeout_s`.
        """
        require("timeout_s", timeout_s, (int, float), "seconds")
        self._environment.run(self._migrate(scenario, timeout_s))

    async def _migrate(self, scenario: str, timeout_s: float) -> None:
        source, destination = self.source.qemu, self.destination.qemu
        async for _ in aio.migrate(source, destination, scenario, Limits(timeout_s=timeout_s)):
            pass


class StepwiseProof:
    """A proof whose steps the caller takes: `migrate`, then `compare`, then `verdict`.

    Its guest, device and QEMUs run already. Each step is carried out once, after the steps before
    it if the caller has left them out. Calling a step again returns the same result.
    """

    def __init__(self, environment: Environment, run: ProofRun) -> None:
        self._environment = environment
        self._run = run

    @property
    def source(self) -> RunningQemu:
        """The QEMU from which the guest is migrated."""
        return RunningQemu(self._run.qemus[SOURCE], self._environment._loop)

    @property
    def destination(self) -> RunningQemu:
        """The QEMU to which the guest is migrated."""
        return RunningQemu(self._run.qemus[DESTINATION], self._environment._loop)

    @property
    def device(self) -> AttachedDevice:
        """The device of both QEMUs, with methods for asynchronous code: see `Environment.run`."""
        return self._run.device

    def migrate(self) -> Migrated:
        """Migrate while the device writes.

        Raises:
            UntestableError: the guest did not boot, or the migration failed.
        """
        return self._migrated

    def compare(self) -> Proof:
        """Compare all RAM, and attribute each lost page; the guest stays paused.

        Raises:
            UntestableError: the migration failed, or the RAM could not be compared.
        """
        return self._compared

    def verdict(self) -> Proof:
        """Let the guest continue and check its pages, and return the complete proof.

        Raises:
            UntestableError: the proof came to no verdict.
        """
        return self._finished

    @functools.cached_property
    def _migrated(self) -> Migrated:
        return self._environment.run(self._run.migrate())

    @functools.cached_property
    def _compared(self) -> Proof:
        return self._environment.run(self._run.compare(self._migrated))

    @functools.cached_property
    def _finished(self) -> Proof:
        return self._environment.run(self._run.finish(self._compared))


@options_as_keywords(ProofOptions)
def prove(options: ProofOptions) -> Proof:
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

        proof = prove(guest="bare", tracker="dirty-ring", scenario="tls")
        assert proof.verdict.exit_code == 0, proof.verdict.sentence
    """
    with Environment() as environment:
        return environment.start_proof(options).verdict()


def check(
    source: AnyQemu | Snapshot,
    destination: AnyQemu | Snapshot,
    *,
    expect_migration: bool = True,
    wait: bool = False,
    resume: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Check:
    """Compare all RAM of two QEMUs after a migration.

    Args:
        source: the path of a QMP socket of the source, or the URI of its libvirt domain; an object
            of your test that executes QMP commands with ``cmd()`` or ``execute()``, such as a
            QEMUMachine; or a snapshot of the source, or its file.
        destination: the same for the destination.
        expect_migration: whether to refuse QEMUs that have not migrated; if False, any two paused
            QEMUs are compared.
        wait: whether to wait until the sockets of the QEMUs exist and the migration has completed.
        resume: whether to continue the guest of the destination after the comparison.
        timeout_s: bounds the wait for each of their answers, in seconds, and with `wait` for the
            end of the migration.

    Returns:
        The outcome: the exit code, a sentence, and every difference.

    Raises:
        UsageError: an argument is not a QEMU, both are the same QEMU, or a client works only in
            another event loop.
        UntestableError: the QEMUs have not migrated, a guest has run since, or memory cannot be
            read.

    Example::

        check("/run/source.qmp", "/run/destination.qmp").require_equal()
    """
    with Environment() as environment:
        return environment.check(
            source,
            destination,
            expect_migration=expect_migration,
            wait=wait,
            resume=resume,
            timeout_s=timeout_s,
        )


def check_images(source: AnyPath, destination: AnyPath) -> Check:
    """Compare two raw images of RAM; see `qmp_tools.aio.check_images`.

    Raises:
        UsageError: a path is not that of a regular file, or both are the same file.
        UntestableError: the images have different sizes, or less than a page.

    Example::

        check_images("source.mem", "destination.mem").require_equal()
    """
    with Environment() as environment:
        return environment.run(aio.check_images(source, destination))


def take_snapshot(
    qemu: AnyQemu,
    file: AnyPath,
    *,
    at_switchover: bool = False,
    with_content: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Snapshot:
    """Take a snapshot of a guest, which `check` can compare without the guest's QEMU.

    Args:
        qemu: the QEMU, in each form that `check` takes.
        file: the path of the file for the snapshot; an existing file is replaced.
        at_switchover: whether to wait for a migration of the guest to complete. The guest may run
            until then, and its QEMU may end at the switchover. If False, the guest is paused now.
        with_content: whether to save the bytes of each page that is not zero. If False, the file
            has a digest of each page, 16 bytes, and a check cannot count the bytes that differ.
        timeout_s: bounds the wait for each answer of QEMU. The wait for the switchover ends at the
            latest when QEMU ends.

    Raises:
        UsageError: `qemu` is not a QEMU, or the file cannot be written.
        MigrationFailedError: the migration failed or was cancelled.
        UntestableError: the guest runs, or its memory cannot be held or read.

    Example::

        snapshot = take_snapshot("/run/source.qmp", "source.snap")
        check(snapshot, "/run/destination.qmp").require_equal()
    """
    with Environment() as environment:
        return environment.run(
            aio.take_snapshot(
                _within(environment._loop, qemu),
                file,
                at_switchover=at_switchover,
                with_content=with_content,
                timeout_s=timeout_s,
            )
        )


class Environment:
    """A context that owns the QEMUs and devices started in it, and ends them when it ends.

    `folder` holds their sockets and logs.
    """

    folder: Path

    def __enter__(self) -> Environment:
        with contextlib.ExitStack() as outer:
            self._loop = outer.enter_context(LoopThread())
            self.folder = outer.enter_context(run_folder())
            self._started = contextlib.AsyncExitStack()
            outer.callback(lambda: self.run(self._started.aclose()))
            self._outer = outer.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._outer.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the environment's event loop, and return its result.

        Raises:
            UsageError: `work` is not a coroutine.
            UntestableError: the disk with the environment's folder is full.
        """
        require("work", work, Coroutine, "a coroutine")
        with room_in(self.folder):
            return self._loop.run(work)

    def qemu(
        self,
        arguments: Sequence[str] = (),
        *,
        binary: AnyPath | None = None,
        accelerator: str | None = None,
        name: str = "test",
    ) -> RunningQemu:
        """Start a QEMU; each needs its own `name`. See `aio.start_qemu` for the arguments.

        Raises:
            UsageError: an argument has the wrong type.
            UntestableError: no QEMU was found, or it does not start.
        """
        return self.run(self._start(name, binary, arguments, accelerator))

    def pair(
        self,
        arguments: Sequence[str] = (),
        *,
        binary: AnyPath | None = None,
        destination_binary: AnyPath | None = None,
        accelerator: str | None = None,
        name: str = "",
    ) -> Pair:
        """Start a source and a destination with the same `arguments`.

        Each pair of an environment needs its own `name`, a prefix of the names of its QEMUs.
        `binary` runs on both sides, unless `destination_binary` is given. See `aio.start_qemu` for
        the other arguments.

        Raises:
            UsageError: an argument has the wrong type.
            UntestableError: no QEMU was found, or one does not start.
        """
        words = words_of("arguments", arguments)
        require("name", name, str, "a name")
        qemus = [
            self.run(self._start(name + side, program, options, accelerator))
            for side, program, options in (
                (SOURCE, binary, words),
                (DESTINATION, destination_binary or binary, [*words, *INCOMING]),
            )
        ]
        return Pair(qemus[0], qemus[1], self)

    async def _start(
        self, name: str, binary: AnyPath | None, arguments: Sequence[str], accelerator: str | None
    ) -> RunningQemu:
        qemu = aio.start_qemu(
            arguments, binary=binary, accelerator=accelerator, name=name, folder=self.folder
        )
        return RunningQemu(await self._started.enter_async_context(qemu), self._loop)

    @options_as_keywords_of_method(ProofOptions)
    def proof(self, options: ProofOptions) -> StepwiseProof:
        """Start the guest and the device of a proof.

        Args:
            options: the fields of `ProofOptions`, as keyword arguments.

        Returns:
            The proof, whose steps the caller takes.

        Raises:
            UsageError: an option does not exist, it cannot have the value, or options contradict
                each other.
            UntestableError: a prerequisite is missing, or a QEMU or the device does not start.

        Example::

            proof = environment.proof(guest="bare", tracker="dirty-ring")
            proof.migrate()
        """
        return self.start_proof(options)

    def start_proof(self, options: ProofOptions) -> StepwiseProof:
        """Start the guest and the device of a proof with these options; see `proof`."""
        run = proof_run(self.run(resolve.resolve(options)), self.folder)
        return StepwiseProof(self, self.run(self._started.enter_async_context(run)))

    def check(
        self,
        source: RunningQemu | AnyQemu | Snapshot,
        destination: RunningQemu | AnyQemu | Snapshot,
        *,
        expect_migration: bool = True,
        wait: bool = False,
        resume: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Check:
        """Compare all RAM of two QEMUs after a migration; see `check`.

        Each can also be a QEMU of this or another environment.
        """
        given = (source, destination)
        loop = next((qemu._loop for qemu in given if isinstance(qemu, RunningQemu)), self._loop)
        qemus = [_within(loop, qemu) for qemu in given]
        with room_in(self.folder):
            return loop.run(
                aio.check(
                    qemus[0],
                    qemus[1],
                    expect_migration=expect_migration,
                    wait=wait,
                    resume=resume,
                    timeout_s=timeout_s,
                )
            )

    def logs(self) -> Iterator[Path]:
        """Yield the logs and command lines of all processes that were started."""
        for file in sorted(self.folder.iterdir()):
            if file.suffix == ".log" or file.name.endswith("-command"):
                yield file


def _within(loop: LoopThread, qemu: RunningQemu | G) -> OwnedQemu | Path | G:
    """Return what `aio.check` takes in `loop`.

    A QEMU whose QMP session belongs to another loop is reached by its free socket.

    Raises:
        UsageError: the client works only in the event loop of its owner.
    """
    if isinstance(qemu, RunningQemu):
        return qemu.qemu if qemu._loop is loop else qemu.socket_path
    if is_asynchronous(qemu):
        raise UsageError(
            f"{type(qemu).__name__} works only in the event loop that connected it: use "
            "'await qmp_tools.aio.check(…)' there"
        )
    return qemu
