"""Domains of libvirt: their URIs, and libvirt's errors, with a libvirt that the tests simulate."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmaproof.errors import DmaproofError, WaitTimeoutError
from qmp_tools.migration.watch import SourceEndedError, View, watch
from qmp_tools.qemu.libvirt_domain import (
    DomainAddressError,
    DomainMigratedError,
    DomainNotRunningError,
    LibvirtPermissionError,
    LibvirtUnreachableError,
    NoDomainError,
    RemoteDomainError,
    domain_address,
)
from qmp_tools.qemu.libvirt_library import LibvirtMissingError, load_libvirt
from qmp_tools.qemu.opening import open_qemu
from qmp_tools.qemu.qemu import Qemu
from qmp_tools.qemu.qmp import QmpClosedError, QmpError, QmpRefusal

VM = "qemu:///system/vm"
UUID = "b6f9c8a7-adb5-4ae9-b86c-61636288bf0b"
VERSION = {"qemu": {"major": 9, "minor": 2, "micro": 0}, "package": "p"}
STOPPED, DESTROYED, MIGRATED = 5, 1, 3  # values of virDomainEventType and of its details
SHUTOFF = 5  # of virDomainState
ENDED = "the domain has ended"
LOST = "QEMU has ended, and libvirt has not noticed yet"


class LibvirtError(Exception):
    """libvirt's exception."""

    def __init__(self, text: str, code: int = 1, number: int = -1, domain: int = 0) -> None:
        super().__init__(text)
        self.get_error_domain = lambda: domain
        self.get_error_code = lambda: code
        self.get_int1 = lambda: number


class Domain:
    """A domain called 'vm', and its connection."""

    def __init__(self) -> None:
        self.names = ["vm"]
        self.active = True
        self.state = lambda: [SHUTOFF, DESTROYED]
        self.threads: Sequence[int] = ()
        self.answers: dict[str, Any] = {}
        self.sent: list[str] = []
        self.how_it_stops: int | None = None
        self.is_transient = False
        self.released: list[object] = []
        self.listeners: list[Callable[..., None]] = []

    # virConnect
    def lookupByName(self, name: str) -> Domain:  # noqa: N802  (libvirt's name)
        if name not in self.names:
            raise LibvirtError("no domain with matching name", Library.VIR_ERR_NO_DOMAIN)
        return self

    def lookupByUUIDString(self, uuid: str) -> Domain:  # noqa: N802
        if uuid != UUID:
            raise LibvirtError("malformed UUID")
        return self

    def listAllDomains(self) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(name=lambda name=name: name) for name in self.names]

    def domainEventRegisterAny(  # noqa: N802
        self, domain: Domain, kind: int, listener: Callable[..., None], opaque: object
    ) -> int:
        assert (domain, kind, opaque) == (self, 0, None)
        self.listeners.append(listener)
        return 42

    def domainEventDeregisterAny(self, callback: int) -> None:  # noqa: N802
        self.released.append(callback)

    def close(self) -> None:
        self.released.append("connection")

    # virDomain
    def connect(self) -> Domain:
        return self

    def isActive(self) -> bool:  # noqa: N802
        if not self.active and self.is_transient:
            raise LibvirtError("Domain not found", Library.VIR_ERR_NO_DOMAIN)
        return self.active

    def jobStats(self, kinds: int) -> dict[str, int]:  # noqa: N802
        assert kinds == 1 | 2
        if self.is_transient:
            raise LibvirtError("Domain not found", Library.VIR_ERR_NO_DOMAIN)
        return {"time_elapsed": 379, "downtime": 10, "memory_processed": 3 << 20, "type": 3}

    def UUIDString(self) -> str:  # noqa: N802
        return UUID

    def notify(self, event: int, detail: int | None) -> None:
        self.listeners[0](self, self, event, detail, None)

    def execute(self, words: str) -> str:
        command = json.loads(words)
        self.sent.append(words)
        standard = {
            "query-version": {"return": VERSION},
            "query-cpus-fast": {"return": [{"thread-id": thread} for thread in self.threads]},
            "query-migrate": {"return": {}},
            "query-migrate-parameters": {"return": {}},
        }
        answer = {**standard, **self.answers}[command["execute"]]
        if answer == ENDED:
            self.active = False
            self.notify(STOPPED - 1, MIGRATED)  # another event
            threading.Timer(0.05, self.notify, (STOPPED, self.how_it_stops)).start()
            raise LibvirtError("domain is not running")
        if answer == LOST:
            threading.Timer(0.05, self.notify, (STOPPED, self.how_it_stops)).start()
            raise LibvirtError(
                "Unable to read from monitor: Connection reset by peer",
                Library.VIR_ERR_SYSTEM_ERROR,
                domain=Library.VIR_FROM_QEMU,
            )
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer)


class Library:
    """The module libvirt."""

    libvirtError = LibvirtError  # noqa: N815
    VIR_DOMAIN_EVENT_ID_LIFECYCLE = 0
    VIR_DOMAIN_EVENT_STOPPED = STOPPED
    VIR_DOMAIN_EVENT_STOPPED_MIGRATED = MIGRATED
    VIR_DOMAIN_JOB_STATS_COMPLETED = 1
    VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED = 2
    VIR_DOMAIN_SHUTOFF = SHUTOFF
    VIR_DOMAIN_SHUTOFF_MIGRATED = 4
    VIR_ERR_SYSTEM_ERROR = 38
    VIR_FROM_QEMU = 10
    VIR_ERR_NO_DOMAIN = 42
    VIR_ERR_AUTH_FAILED = 45
    VIR_ERR_AUTH_CANCELLED = 79
    VIR_ERR_AUTH_UNAVAILABLE = 80
    VIR_ERR_ACCESS_DENIED = 88

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.uris: list[str] = []
        self.failure: Exception | None = None
        self.blocked: threading.Event | None = None
        self.handlers: list[Callable[..., None]] = []

    def registerErrorHandler(self, handler: Callable[..., None], context: object) -> None:  # noqa: N802
        self.handlers.append(handler)

    def virEventRegisterDefaultImpl(self) -> None:  # noqa: N802
        pass

    def virEventRunDefaultImpl(self) -> None:  # noqa: N802
        threading.Event().wait()  # a daemon thread that waits for events that never come

    def open(self, uri: str) -> Domain:
        self.uris.append(uri)
        if self.blocked:
            self.blocked.wait()
        if self.failure:
            raise self.failure
        return self.domain


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """A libvirt with a domain called 'vm', which runs."""
    library = Library(Domain())
    monkeypatch.setitem(sys.modules, "libvirt", library)
    monkeypatch.setitem(
        sys.modules,
        "libvirt_qemu",
        SimpleNamespace(qemuMonitorCommand=lambda domain, words, flags: domain.execute(words)),
    )
    load_libvirt.cache_clear()
    yield library
    load_libvirt.cache_clear()


def used(uri: str, use: Callable[[Qemu], Any], timeout_s: float = 600) -> Any:
    async def opened() -> Any:
        async with open_qemu("source QEMU", uri, timeout_s=timeout_s) as qemu:
            return await use(qemu)

    return asyncio.run(opened())


async def status(qemu: Qemu) -> tuple[str, str, int]:
    return qemu.version, qemu.address, qemu.pid


@pytest.mark.parametrize(
    ("uri", "connection", "name", "host", "on_host"),
    [
        (VM, "qemu:///system", "vm", "", VM),
        ("qemu:///session/my-vm", "qemu:///session", "my-vm", "", "qemu:///session/my-vm"),
        ("qemu:///system/a%20b", "qemu:///system", "a b", "", "qemu:///system/a%20b"),
        ("qemu+unix:///system/vm?socket=/run/s", "qemu+unix:///system?socket=/run/s", "vm", "", VM),
        ("qemu+ssh://root@h:22/system/vm", "qemu+ssh://root@h:22/system", "vm", "root@h:22", VM),
        ("qemu+tls://h/system/vm?no_verify=1", "qemu+tls://h/system?no_verify=1", "vm", "h", VM),
        ("qemu+ssh://[::1]/system/vm", "qemu+ssh://[::1]/system", "vm", "[::1]", VM),
    ],
)
def test_a_domain_is_named_by_the_uri_of_its_connection_and_its_name(
    uri: str, connection: str, name: str, host: str, on_host: str
) -> None:
    address = domain_address(uri)
    assert address is not None
    assert (address.uri, address.connection, address.name) == (uri, connection, name)
    assert (address.host, address.uri_on_host) == (host, on_host)


@pytest.mark.parametrize("path", ["/run/qmp", "qmp.sock", "qemu/qmp", "qemu", "tcp://host:1"])
def test_other_arguments_are_not_uris(path: str) -> None:
    assert domain_address(path) is None


@pytest.mark.parametrize(
    "uri",
    [
        *("qemu:///system", "qemu:///system/", "qemu:///syste/vm", "qemu:/system/vm"),
        *("xen:///system/vm", "QEMU:///system/vm", "test+unix:///default/test"),
        *("qemu:///system/vm/x", "qemu:///embed/vm", "qemu+ssh:vm", "qemu:///system?socket=/x"),
    ],
)
def test_a_uri_that_names_no_domain_is_wrong_usage(uri: str) -> None:
    with pytest.raises(DomainAddressError, match=r"expected .* qemu:///system/NAME"):
        domain_address(uri)


def test_commands_go_through_libvirt(library: Library) -> None:
    async def work(qemu: Qemu) -> Any:
        return await qemu.qmp.execute("migrate-set", max_bandwidth=1), await status(qemu)

    library.domain.answers["migrate-set"] = {"return": {"done": 1}, "id": "libvirt-3"}
    assert used(VM, work) == ({"done": 1}, ("9.2.0 p", VM, 0))
    assert json.loads(library.domain.sent[-1]) == {
        "execute": "migrate-set",
        "arguments": {"max-bandwidth": 1},
    }
    assert library.uris == ["qemu:///system"]
    assert library.domain.released == [42, "connection"]
    assert len(library.handlers) == 1, "libvirt would print its errors"
    library.handlers[0](None, ())
    assert used(VM.replace("vm", UUID), status)[0] == "9.2.0 p"


def test_a_refusal_of_qemu_has_its_reason(library: Library) -> None:
    library.domain.answers["x"] = {"error": {"class": "GenericError", "desc": "not now"}}
    with pytest.raises(QmpRefusal, match=r"^source QEMU refused x: not now$"):
        used(VM, lambda qemu: qemu.qmp.execute("x"))


def test_a_failure_of_libvirt_is_not_a_refusal(library: Library) -> None:
    library.domain.answers["x"] = LibvirtError("cannot acquire state change lock")
    with pytest.raises(QmpError, match="libvirt could not execute x: cannot acquire") as caught:
        used(VM, lambda qemu: qemu.qmp.execute("x"))
    assert not isinstance(caught.value, (QmpRefusal, QmpClosedError))


@pytest.mark.parametrize("is_transient", [False, True])
def test_the_end_by_a_migration_is_told_from_other_ends(
    library: Library, is_transient: bool
) -> None:
    domain = library.domain
    domain.answers["x"] = ENDED
    domain.is_transient = is_transient
    domain.how_it_stops = MIGRATED
    with pytest.raises(DomainMigratedError, match=r"has completed.*--at-switchover --background"):
        used(VM, lambda qemu: qemu.qmp.execute("x"))
    domain.notify(STOPPED, DESTROYED)  # it was started, and has stopped again
    domain.listeners.clear()
    domain.active, domain.how_it_stops = True, DESTROYED
    with pytest.raises(QmpClosedError, match="domain vm stopped before") as caught:
        used(VM, lambda qemu: qemu.qmp.execute("x"))
    assert not isinstance(caught.value, DomainMigratedError)


async def _views(qemu: Qemu) -> list[View]:
    return [view async for view in watch(qemu, 0.01)]


@pytest.mark.parametrize(
    ("is_transient", "line"),
    [
        (False, "completed, elapsed 0.4 s, sent 3 MiB, source ended by libvirt, downtime 10 ms"),
        (True, "completed, source ended by libvirt"),
    ],
)
def test_watch_takes_libvirts_word_that_the_migration_completed(
    library: Library, is_transient: bool, line: str
) -> None:
    library.domain.answers["query-migrate-parameters"] = ENDED
    library.domain.how_it_stops = MIGRATED
    library.domain.is_transient = is_transient
    (view,) = used(VM, _views)
    assert view.is_over
    assert view.ended_by_libvirt
    assert view.line == line


@pytest.mark.parametrize("answer", [ENDED, LOST])
def test_watch_reports_a_domain_that_ended_otherwise(library: Library, answer: str) -> None:
    library.domain.answers["query-migrate"] = answer
    library.domain.how_it_stops = DESTROYED
    with pytest.raises(SourceEndedError, match="ended before a migration began"):
        used(VM, _views)


def failure(library: Library, uri: str = VM, timeout_s: float = 600) -> DmaproofError:
    with pytest.raises(DmaproofError) as caught:
        used(uri, status, timeout_s)
    return caught.value


def test_an_unknown_domain_is_reported_with_the_names_that_exist(library: Library) -> None:
    library.domain.names = ["vm", "b"]
    error = failure(library, "qemu:///system/c")
    assert isinstance(error, NoDomainError)
    assert str(error).endswith("no domain called c; its domains are: b, vm")
    library.domain.names = []
    assert str(failure(library)).endswith("its domains are: none")
    library.domain.names = [f"{number:03}" for number in range(300)]
    assert str(failure(library)).endswith(", 019, …")
    assert library.domain.released == ["connection"] * 3


def test_a_domain_that_does_not_run_is_reported(library: Library) -> None:
    library.domain.active = False
    error = failure(library)
    assert isinstance(error, DomainNotRunningError)
    assert "is not running, so it has no QEMU: start it ('virsh start vm')" in str(error)
    library.domain.state = lambda: [SHUTOFF, Library.VIR_DOMAIN_SHUTOFF_MIGRATED]
    error = failure(library)
    assert isinstance(error, DomainNotRunningError)
    assert f"'dmaproof snapshot {VM} FILE --at-switchover --background'" in str(error)
    assert library.domain.released == [42, "connection"] * 2


@pytest.mark.parametrize(
    ("code", "number", "uri", "kind", "remedy"),
    [
        (38, errno.EACCES, VM, LibvirtPermissionError, "a member of the group libvirt"),
        (88, -1, VM, LibvirtPermissionError, "a member of the group libvirt"),
        (80, -1, VM, LibvirtPermissionError, "a member of the group libvirt"),
        (38, errno.ENOENT, VM, LibvirtUnreachableError, "systemctl start libvirtd"),
        (38, errno.ECONNREFUSED, VM, LibvirtUnreachableError, "systemctl start libvirtd"),
        (
            *(38, errno.ECONNREFUSED, "qemu+tcp://h/system/vm", LibvirtUnreachableError),
            "'virsh -c qemu+tcp://h/system list' works",
        ),
        (8, -1, VM, LibvirtUnreachableError, "'virsh -c qemu:///system list' works"),
    ],
)
def test_a_libvirt_that_cannot_be_reached_is_reported(
    library: Library, code: int, number: int, uri: str, kind: type, remedy: str
) -> None:
    library.failure = LibvirtError("libvirt's reason", code, number)
    error = failure(library, uri)
    assert type(error) is kind
    assert "libvirt's reason" in str(error)
    assert remedy in str(error)


def test_a_libvirt_that_fails_later_is_reported(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise LibvirtError("End of file while reading data")

    monkeypatch.setattr(library.domain, "UUIDString", broken)
    error = failure(library)
    assert isinstance(error, LibvirtUnreachableError)
    assert "libvirt at qemu:///system has failed: End of file" in str(error)


def test_a_libvirt_that_does_not_answer_is_not_awaited_for_ever(library: Library) -> None:
    library.blocked = threading.Event()
    error = failure(library, timeout_s=0.1)
    assert isinstance(error, WaitTimeoutError)
    assert "check that 'virsh -c qemu:///system list' answers" in str(error)
    library.blocked.set()


def test_a_missing_library_is_named_with_the_packages_that_it_needs(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "libvirt_qemu", None)  # makes its import fail
    error = failure(library)
    assert isinstance(error, LibvirtMissingError)
    for word in ("dmaproof[libvirt]", "pkg-config", "headers of libvirt"):
        assert word in str(error)


def test_memory_on_another_host_is_read_there(library: Library) -> None:
    library.domain.threads = [threading.get_native_id()]
    with pytest.raises(RemoteDomainError, match=f"'dmaproof snapshot {VM} FILE' there"):
        used("qemu+ssh://h/system/vm", lambda qemu: qemu.qmp.execute("pmemsave", val=0))
    library.domain.answers["pmemsave"] = {"return": {}}
    assert used(VM, lambda qemu: qemu.qmp.execute("pmemsave", val=0)) == {}


def test_the_process_is_one_that_runs_the_domain(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
    library.domain.threads = [threading.get_native_id()]
    assert used(VM, status)[2] == 0, "the process has another command line"
    monkeypatch.setattr(library.domain, "UUIDString", lambda: own)
    assert used(VM, status)[2] == os.getpid()
    assert used("qemu+ssh://h/system/vm", status)[2] == 0
