"""Start child processes with logs, which are reaped and cannot outlive dmaproof."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, printable

from .reaper import marked_environment
from .unexpected import is_full

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)

_END_GRACE_S: Final = 5.0
_TAIL_BYTES: Final = 1 << 16
_TAIL_LINES: Final = 15
_WHY_KILLED: Final = {
    signal.SIGXFSZ: "a file has exceeded the limit of 'ulimit -f'",
    signal.SIGXCPU: "the process has exceeded the CPU time limit of 'ulimit -t'",
}


def death_with_parent() -> Callable[[], None]:
    """Make a ``preexec_fn`` for a child that must not outlive this process.

    The kernel kills the child when the *thread* that started it ends, see prctl(2).
    """
    parent = os.getpid()

    def bind() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl()
            os._exit(1)

    return bind


class ProcessDiedError(UntestableError):
    """A process of the proof ended too early; `killed` says whether a signal killed it."""

    def __init__(self, message: str, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


class Process:
    """A child process. Its output goes to `log`; `died` is done when it has ended.

    `name` is its name in messages, such as 'source QEMU' or 'device'; `command` is its command
    line. If the process ends too early, the error also shows the last lines of each of `more_logs`.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, child: asyncio.subprocess.Process
    ) -> None:
        self.name = name
        self.command = command
        self.log = log
        self.more_logs: Sequence[Path] = ()
        self._child = child
        self._expected = False
        self._may_succeed = False
        self.died = asyncio.ensure_future(self._child.wait())

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        pass_fds: Sequence[int] = (),
        run_folder: Path | None = None,
    ) -> Process:
        """Start `command` in a new session, so that an interrupt reaches only dmaproof.

        A third party's program may have children. Pass `run_folder` to have the children that still
        run killed when `run_folder` is removed.

        Raises:
            UntestableError: the program could not be executed.
        """
        with log.open("wb") as output:
            try:
                child = await asyncio.create_subprocess_exec(
                    *command,
                    env=None if run_folder is None else marked_environment(run_folder),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=pass_fds,
                    start_new_session=True,
                    preexec_fn=death_with_parent(),
                )
            except OSError as error:
                raise UntestableError(
                    f"cannot start the {name}: {command[0]}: {error.strerror}"
                ) from error
        return cls(name, command, log, child)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def expect_end(self) -> None:
        """Do not report the end of the process from now on."""
        self._expected = True

    def allow_success(self) -> None:
        """Do not report from now on that the process has ended with exit code 0."""
        self._may_succeed = True

    async def missed(self) -> ProcessDiedError:
        """Wait until the process has ended unexpectedly, and return an error that says so."""
        await asyncio.shield(self.died)
        if self._expected or (self._may_succeed and self._child.returncode == 0):
            await asyncio.get_running_loop().create_future()  # wait for ever: no error
        message = f"{self.name} {self.how_it_ended()}\n{self.log_tail()}".rstrip()
        return ProcessDiedError(message, killed=(self._child.returncode or 0) < 0)

    def how_it_ended(self) -> str:
        """Return 'was killed by SIGKILL', 'ended with exit code 1', or 'is running'."""
        code = self._child.returncode
        if code is None:
            return "is running"
        if code < 0:
            number = signal.Signals(-code)
            why = _WHY_KILLED.get(number)
            return f"was killed by {number.name}" + (f" ({why})" if why else "")
        return f"ended with exit code {code}"

    @property
    def description(self) -> str:
        """The name with the process id, and whether it is stopped: 'device (PID 7, stopped)'."""
        return f"{self.name} (PID {self.pid}{', stopped' if self.is_stopped else ''})"

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped the process (states T and t of proc(5))."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in "Tt"

    def log_tail(self) -> str:
        """Return the last lines of each log, with the log's name; empty without any output."""
        return "\n".join(filter(None, map(log_tail, (self.log, *self.more_logs))))

    async def kill(self) -> None:
        """Kill the process and its children with SIGKILL, to simulate a crash of its host."""
        self.expect_end()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # it leads a session, see `start`
        await asyncio.shield(self.died)

    async def end(self) -> None:
        """End the process with SIGTERM, or else with SIGKILL, and reap it."""
        self.expect_end()
        for signal_number, timeout_s in ((signal.SIGTERM, _END_GRACE_S), (signal.SIGKILL, None)):
            if self.died.done():
                break
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal_number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.died), timeout_s)


def log_tail(log: Path) -> str:
    """Return the last lines of `log` under a heading; empty if there are none.

    If the log's file system is full, add a line that says so.
    """
    tail = []
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        tail += [f"  last lines of {log.name}:"] * bool(lines)
        tail += [f"    {printable(line)}" for line in lines]
        if is_full(log.parent):
            tail.append(f"  no space left in {log.parent}: set TMPDIR to another folder")
    return "\n".join(tail)
