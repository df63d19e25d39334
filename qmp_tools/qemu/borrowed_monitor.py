"""Execute QMP commands through an object that a test has already, such as a virtual machine.

The object has a method `cmd` or `execute` that takes the command's name and its arguments. These
interfaces are supported:

- QEMUMachine of QEMU's package qemu.machine, and QEMUMonitorProtocol: ``cmd(name, **arguments)``
- QMPClient of qemu.qmp: ``await execute(name, arguments)``, in the event loop that connected it
- avocado-vt: ``cmd(name, arguments)`` of the monitor ``vm.monitor``

A blocking method runs in a thread of its own. A client must not be used by its owner at the same
time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from dmaproof.errors import UsageError

from ..host.daemon_thread import in_daemon_thread
from ..host.process_status import has_thread, process_of_thread
from ..host.timeout import DEFAULT_TIMEOUT_S
from .qemu import Qemu
from .qmp import Monitor, QmpError, version_text

_METHODS: Final = ("cmd", "execute")
_RESPONSE: Final = frozenset({"return", "error", "id", "timestamp"})
"""The members of a QMP response, which some clients return as it is."""


class BorrowedMonitor(Monitor):
    """A monitor that calls the method `call` of a third party's client."""

    def __init__(self, name: str, call: Callable[..., Any], timeout_s: float) -> None:
        super().__init__(name, timeout_s)
        self._call = call
        parameters = inspect.signature(call).parameters
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._takes_mapping = sum(each.kind in positional for each in parameters.values()) > 1
        # avocado-vt's monitor would write each command to the log of the test.
        self._quiet = {"debug": False} if "debug" in parameters else {}
        self._version = ""

    @classmethod
    async def open(cls, name: str, call: Callable[..., Any], timeout_s: float) -> BorrowedMonitor:
        """Make a monitor, and check that QEMU answers on it.

        Raises:
            UsageError: the client does not speak QMP.
            QmpError: QEMU does not answer.
        """
        monitor = cls(name, call, timeout_s)
        answer = await monitor.execute("query-version")
        if not isinstance(answer, Mapping):
            raise UsageError(
                f"{name}: expected QMP's answer to query-version from the client of the test, got "
                f"{answer!r}; a human monitor (HMP) does not suffice"
            )
        try:
            monitor._version = version_text(answer)
        except (LookupError, TypeError, ValueError):
            raise UsageError(
                f"{name}: the client of the test returned {answer!r} for query-version: expected "
                "QEMU's answer. Give the client of QEMU's own QMP socket"
            ) from None
        return monitor

    @property
    def version(self) -> str:
        """QEMU's version."""
        return self._version

    async def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        try:
            answer = await self._pass_on(command, arguments)
        except Exception as error:
            if _is_refusal(error):
                raise self._refusal(command, error) from error
            raise QmpError(
                f"{self.name}: the client of the test could not execute {command}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if isinstance(answer, Mapping) and answer.keys() <= _RESPONSE:
            if given := answer.get("error"):
                why = given.get("desc", given) if isinstance(given, Mapping) else given
                raise self._refusal(command, why)
            return answer.get("return", answer)
        return answer

    async def _pass_on(self, command: str, arguments: Mapping[str, Any]) -> Any:
        positional = (dict(arguments),) if arguments and self._takes_mapping else ()
        named = {**({} if self._takes_mapping else arguments), **self._quiet}
        if inspect.iscoroutinefunction(self._call):
            return await self._call(command, *positional, **named)
        return await in_daemon_thread(lambda: self._call(command, *positional, **named))


def _is_refusal(error: Exception) -> bool:
    """Return whether an error of a client has QEMU's own error (QMP's 'class' and 'desc').

    qemu.qmp's ExecuteError has them as `error_class` and `description`, avocado-vt's QMPCmdError in
    `data`.
    """
    data = getattr(error, "data", None)
    return hasattr(error, "error_class") or (isinstance(data, Mapping) and "desc" in data)


@contextlib.asynccontextmanager
async def borrow(
    name: str, client: object, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[Qemu]:
    """Use the QEMU of `client`, an object as described above.

    Args:
        name: the name of the QEMU in messages.
        client: the object, which must be connected to its QEMU.
        timeout_s: the bound of the wait for each answer.

    Yields:
        The QEMU. Its process is found by the threads of its vCPUs, or else is the one that
        `client.get_pid()` or `client.pid` says.

    Raises:
        UsageError: the client does not speak QMP.
        QmpError: QEMU does not answer.
    """
    call = _find_method(client)
    assert call is not None, "see is_client"
    monitor = await BorrowedMonitor.open(name, call, timeout_s)
    vcpus = await monitor.execute("query-cpus-fast")
    yield Qemu(monitor, _process_of(client, [vcpu["thread-id"] for vcpu in vcpus]), _label(client))


def is_client(given: object) -> bool:
    """Return whether `given` has a method through which QMP commands can be executed."""
    return _find_method(given) is not None


def is_asynchronous(client: object) -> bool:
    """Return whether `client` works only in the event loop in which it was connected."""
    return inspect.iscoroutinefunction(_find_method(client))


def _find_method(client: object) -> Callable[..., Any] | None:
    for owner in (client, getattr(client, "monitor", None)):
        for method in _METHODS:
            if callable(found := getattr(owner, method, None)):
                call: Callable[..., Any] = found
                return call
    return None


def _process_of(client: object, threads: list[int]) -> int:
    pid = getattr(client, "get_pid", None) or getattr(client, "pid", None)
    given = None
    with contextlib.suppress(Exception):  # a virtual machine may say that it was not launched
        given = pid() if callable(pid) else pid
    if type(given) is int and given > 0 and (not threads or has_thread(given, threads[0])):
        return given
    # The client's process may be a wrapper around QEMU, such as a shell.
    return process_of_vcpus(threads)


def process_of_vcpus(threads: list[int]) -> int:
    """Return the process whose threads are the vCPUs with the ids `threads`; 0 if there is none.

    QEMU reports the ids (QMP's query-cpus-fast). If QEMU runs in another PID namespace or on
    another host, they belong to no process here, or to several.
    """
    processes = {process_of_thread(thread) for thread in threads}
    process = processes.pop() if len(processes) == 1 else None
    return process or 0


def _label(client: object) -> str:
    name = getattr(client, "name", None)
    kind = type(client).__name__
    return f"{kind} {name}" if isinstance(name, str) else kind
