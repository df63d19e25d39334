"""Execute QMP commands through libvirt, for a QEMU that runs as a libvirt domain.

libvirt uses the QMP monitor of a domain itself, and passes on the commands of others, as ``virsh
qemu-monitor-command`` does (virDomainQemuMonitorCommand). So the domain needs no second monitor. A
domain is named by libvirt's connection URI, with the name or UUID of the domain after a slash, for
example qemu:///system/vm, qemu:///session/vm or qemu+ssh://host/system/vm.

libvirt ends the QEMU of the source as soon as a migration has completed. It sends an event then,
which says why the domain has stopped, and which comes even if the domain is removed.

libvirt's functions block, so each call runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError

from ..host.daemon_thread import in_daemon_thread
from ..host.timeout import DEFAULT_TIMEOUT_S, bounded
from .borrowed_monitor import process_of_vcpus
from .libvirt_library import load_libvirt
from .qemu import Qemu
from .qmp import Monitor, QmpClosedError, QmpError, version_text

_PREFIX: Final = re.compile(r"qemu(\+\w+)?:")
_OTHER_URI: Final = re.compile(r"(?!tcp:|unix:)[A-Za-z]\w*(\+\w+)?://")
_URI: Final = re.compile(
    r"(?P<connection>qemu(\+\w+)?://(?P<host>[^/?]*)/(?P<instance>system|session))"
    r"/(?P<name>[^/?]+)(?P<query>\?.*)?"
)
_JOB_STATISTICS: Final = {"total-time": "time_elapsed", "downtime": "downtime"}
_MEMORY_STATISTICS: Final = {
    "transferred": "memory_processed",
    "total": "memory_total",
    "remaining": "memory_remaining",
    "dirty-sync-count": "memory_iteration",
}
"""The members of query-migrate's answer, and the statistics of libvirt that were made from them
(qemuDomainMigrationJobDataToParams)."""
_MOST_LISTED: Final = 20
_TIDY_UP_S: Final = 5
_NO_PERMISSION: Final = (errno.EACCES, errno.EPERM)
_NO_SERVER: Final = (errno.ENOENT, errno.ECONNREFUSED)


class DomainAddressError(UsageError):
    """The argument begins like the URI of a libvirt domain, but is none."""


class LibvirtUnreachableError(UntestableError):
    """libvirt cannot be reached."""


class LibvirtPermissionError(LibvirtUnreachableError):
    """This user may not use libvirt."""


class NoDomainError(UsageError):
    """libvirt has no domain of this name."""


class DomainNotRunningError(UntestableError):
    """The domain has no QEMU, because it does not run."""


class DomainMigratedError(QmpClosedError):
    """The migration of the domain has completed, and libvirt has ended its QEMU.

    `migration` is what QMP's query-migrate would answer, as far as libvirt knows it.
    """

    def __init__(self, message: str, migration: dict[str, Any]) -> None:
        super().__init__(message)
        self.migration = migration


class RemoteDomainError(UntestableError):
    """The memory of a domain on another host cannot be read."""


@dataclass(frozen=True)
class DomainAddress:
    """A domain at `uri`: the URI of a `connection` to libvirt, and the domain's `name` or UUID.

    `host` is empty if libvirt runs on this host. `uri_on_host` is the domain's URI on its own host.
    """

    uri: str
    connection: str
    name: str
    host: str
    uri_on_host: str


def domain_address(argument: str) -> DomainAddress | None:
    """Return the domain that `argument` names; None if it is not a URI of libvirt.

    Raises:
        DomainAddressError: it begins like a URI of libvirt, but names no domain.
    """
    if not _PREFIX.match(argument):
        if _OTHER_URI.match(argument):
            raise DomainAddressError(
                f"{argument} is not a URI of libvirt's QEMU driver: expected a URI such as "
                "qemu:///system/NAME"
            )
        return None
    parts = _URI.fullmatch(argument)
    if parts is None:
        raise DomainAddressError(
            f"{argument} is not the URI of a libvirt domain: expected the URI of a connection, a "
            "slash and the name of the domain, such as qemu:///system/NAME ('virsh list --all' "
            "lists the names)"
        )
    return DomainAddress(
        uri=argument,
        connection=parts["connection"] + (parts["query"] or ""),
        name=urllib.parse.unquote(parts["name"]),
        host=parts["host"],
        uri_on_host=f"qemu:///{parts['instance']}/{parts['name']}",
    )


def require_local(name: str, given: object) -> None:
    """Require that the memory of the QEMU that was `given` can be on this host.

    Raises:
        RemoteDomainError: it is the domain of another host.
    """
    if isinstance(given, str) and (address := domain_address(given)) and address.host:
        raise _remote(name, address)


def _remote(name: str, address: DomainAddress) -> RemoteDomainError:
    return RemoteDomainError(
        f"the memory of {name} is on the host {address.host}: run 'dmaproof snapshot "
        f"{address.uri_on_host} FILE' there, copy FILE to this host, and give FILE instead of the "
        "URI"
    )


class DomainMonitor(Monitor):
    """The QMP monitor of a `domain` (libvirt's virDomain), which is at `address`."""

    def __init__(self, name: str, timeout_s: float, domain: Any, address: DomainAddress) -> None:
        super().__init__(name, timeout_s)
        self._libvirt, self._libvirt_qemu = load_libvirt()
        self._domain = domain
        self._address = address
        self._why_stopped: Future[int] = Future()
        self._version = ""

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Wait for the event that says why the domain stops, and check that QEMU answers.

        Raises:
            DomainNotRunningError: the domain does not run.
            QmpError: QEMU does not answer.
        """
        connection = self._domain.connect()
        callback = await in_daemon_thread(
            connection.domainEventRegisterAny,
            self._domain,
            self._libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            self._note_event,
            None,
        )
        try:
            if not await in_daemon_thread(self._domain.isActive):
                raise await self._not_running()
            self._version = version_text(await self.execute("query-version"))
            yield
        finally:  # else libvirt keeps this object and its connection
            await _call_briefly(connection.domainEventDeregisterAny, callback)

    def _note_event(
        self, _connection: object, _domain: object, event: int, detail: int, _: object
    ) -> None:
        if event == self._libvirt.VIR_DOMAIN_EVENT_STOPPED and not self._why_stopped.done():
            self._why_stopped.set_result(detail)

    async def _not_running(self) -> DomainNotRunningError:
        libvirt, name = self._libvirt, self._address.name
        if await in_daemon_thread(self._domain.state) == [
            libvirt.VIR_DOMAIN_SHUTOFF,
            libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED,
        ]:
            return DomainNotRunningError(
                f"{self.name}: domain {name} has been migrated, and libvirt has ended it on this "
                f"host. {self._keep_memory()}"
            )
        return DomainNotRunningError(
            f"{self.name}: domain {name} is not running, so it has no QEMU: start it ('virsh start "
            f"{name}')"
        )

    def _keep_memory(self) -> str:
        return (
            "libvirt ends the source when a migration completes. To check a migration, start "
            f"'dmaproof snapshot {self._address.uri_on_host} FILE --at-switchover --background' "
            "before it, and give FILE as the source"
        )

    @property
    def version(self) -> str:
        """QEMU's version."""
        return self._version

    async def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "pmemsave" and self._address.host:
            raise _remote(self.name, self._address)
        words = json.dumps({"execute": command, "arguments": dict(arguments)})
        try:
            text = await in_daemon_thread(
                self._libvirt_qemu.qemuMonitorCommand, self._domain, words, 0
            )
        except self._libvirt.libvirtError as error:
            if not self._has_lost_monitor(error) and await self._is_running():
                raise QmpError(
                    f"{self.name}: libvirt could not execute {command}: {error}"
                ) from error
            raise await self._stopped(command) from error
        answer = json.loads(text)
        if "error" in answer:
            raise self._refusal(command, answer["error"]["desc"])
        return answer["return"]

    def _has_lost_monitor(self, error: Any) -> bool:
        """Return whether QEMU closed its monitor; libvirt may still call the domain active."""
        return (error.get_error_domain(), error.get_error_code()) == (
            self._libvirt.VIR_FROM_QEMU,
            self._libvirt.VIR_ERR_SYSTEM_ERROR,  # qemuMonitorIORead
        )

    async def _is_running(self) -> bool:
        try:
            return bool(await in_daemon_thread(self._domain.isActive))
        except self._libvirt.libvirtError as error:
            # libvirt removes a transient domain when it stops.
            return bool(error.get_error_code() != self._libvirt.VIR_ERR_NO_DOMAIN)

    async def _stopped(self, command: str) -> QmpClosedError:
        """Wait for the event, which libvirt sends after the domain has stopped."""
        # Without the shield, a timeout would cancel the future, which then could not be set.
        why = await asyncio.shield(asyncio.wrap_future(self._why_stopped))
        if why == self._libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED:
            return DomainMigratedError(
                f"the migration of {self.name} has completed, and libvirt has ended it before it "
                f"answered {command}. {self._keep_memory()}",
                await self._completed_migration(),
            )
        return QmpClosedError(
            f"domain {self._address.name} stopped before {self.name} answered {command}; look at "
            f"QEMU's log (for qemu:///system: /var/log/libvirt/qemu/{self._address.name}.log)"
        )

    async def _completed_migration(self) -> dict[str, Any]:
        kinds = (
            self._libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
            | self._libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED  # for virsh domjobinfo
        )
        try:
            statistics = await in_daemon_thread(self._domain.jobStats, kinds)
        except self._libvirt.libvirtError:  # libvirt has removed the domain
            statistics = {}
        ram = _known(statistics, _MEMORY_STATISTICS)
        return {"status": "completed", "ram": ram, **_known(statistics, _JOB_STATISTICS)}


def _known(statistics: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {qmp: statistics[name] for qmp, name in names.items() if name in statistics}


@contextlib.asynccontextmanager
async def open_domain(
    name: str, address: DomainAddress, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[Qemu]:
    """Use the QEMU of a libvirt domain.

    Args:
        name: the name of the QEMU in messages.
        address: the domain.
        timeout_s: the bound of the wait for the connection, and for each answer.

    Yields:
        The QEMU. Its `pid` is 0 if the domain is on another host or in another PID namespace.

    Raises:
        LibvirtMissingError: libvirt-python is not installed.
        LibvirtUnreachableError: libvirt does not answer; `LibvirtPermissionError` if this user may
            not use it.
        NoDomainError: libvirt has no such domain.
        DomainNotRunningError: the domain does not run.
        QmpError: QEMU does not answer.
        WaitTimeoutError: libvirt does not answer in time.
    """
    libvirt, _ = load_libvirt()
    late = WaitTimeoutError(
        f"{name}: no answer from libvirt at {address.connection} within {timeout_s:g} s; allow "
        f"more time (--timeout), or check that 'virsh -c {address.connection} list' answers"
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with bounded(timeout_s, lambda: late):
                connection = await _connect(name, address)
                stack.push_async_callback(_call_briefly, connection.close)
                domain = await _find_domain(connection, name, address)
                monitor = DomainMonitor(name, timeout_s, domain, address)
                await stack.enter_async_context(monitor.connected())
                uuid = await in_daemon_thread(domain.UUIDString)
        except libvirt.libvirtError as error:
            raise LibvirtUnreachableError(
                f"{name}: libvirt at {address.connection} has failed: {error}"
            ) from error
        threads = [vcpu["thread-id"] for vcpu in await monitor.execute("query-cpus-fast")]
        pid = 0 if address.host else _process_of(threads, uuid)
        yield Qemu(monitor, pid, address.uri)


async def _call_briefly(function: Callable[..., object], *arguments: object) -> None:
    """Call a function that tidies up; a libvirt that does not answer is not an error."""
    libvirt, _ = load_libvirt()
    with contextlib.suppress(TimeoutError, libvirt.libvirtError):
        async with asyncio.timeout(_TIDY_UP_S):
            await in_daemon_thread(function, *arguments)


async def _connect(name: str, address: DomainAddress) -> Any:
    libvirt, _ = load_libvirt()
    try:
        return await in_daemon_thread(libvirt.open, address.connection)
    except libvirt.libvirtError as error:
        raise _unreachable(libvirt, name, address, error) from error


def _unreachable(
    libvirt: Any, name: str, address: DomainAddress, error: Any
) -> LibvirtUnreachableError:
    code, number = error.get_error_code(), error.get_int1()
    what = f"{name}: cannot connect to libvirt at {address.connection}: {error}"
    denied = (
        libvirt.VIR_ERR_ACCESS_DENIED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    )
    if code in denied or (code == libvirt.VIR_ERR_SYSTEM_ERROR and number in _NO_PERMISSION):
        return LibvirtPermissionError(
            f"{what}. Run dmaproof as root or as a member of the group libvirt; domains of "
            "qemu:///session belong to the user who started them"
        )
    if code == libvirt.VIR_ERR_SYSTEM_ERROR and number in _NO_SERVER and not address.host:
        return LibvirtUnreachableError(
            f"{what}. Start libvirt (systemctl start libvirtd), or correct the URI"
        )
    return LibvirtUnreachableError(f"{what}. Check that 'virsh -c {address.connection} list' works")


async def _find_domain(connection: Any, name: str, address: DomainAddress) -> Any:
    libvirt, _ = load_libvirt()
    for look_up in (connection.lookupByName, connection.lookupByUUIDString):
        with contextlib.suppress(libvirt.libvirtError):  # a name is not a valid UUID either
            return await in_daemon_thread(look_up, address.name)
    domains = await in_daemon_thread(connection.listAllDomains)
    names = sorted(domain.name() for domain in domains)
    shown = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
    raise NoDomainError(
        f"{name}: libvirt at {address.connection} has no domain called {address.name}; its "
        f"domains are: {shown or 'none'}"
    )


def _process_of(vcpu_threads: list[int], uuid: str) -> int:
    """Return the process that has the threads, if libvirt started it for the domain; else 0.

    A socket may lead to a libvirt in another PID namespace, whose thread ids mean nothing here.
    """
    pid = process_of_vcpus(vcpu_threads)
    with contextlib.suppress(OSError):
        # qemuBuildCommandLine gives each QEMU the UUID of its domain (-uuid).
        if uuid.encode() in (Path("/proc") / str(pid) / "cmdline").read_bytes():
            return pid
    return 0
