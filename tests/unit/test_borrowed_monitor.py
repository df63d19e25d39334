"""QMP commands through a client that belongs to a test."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dmaproof.errors import UsageError
from qmp_tools.host.daemon_thread import in_daemon_thread
from qmp_tools.qemu.borrowed_monitor import borrow, is_asynchronous, process_of_vcpus
from qmp_tools.qemu.opening import AnyQemu, require_openable
from qmp_tools.qemu.qmp import QmpError, QmpRefusal, QmpTimeoutError

VERSION = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "v10"}


class ExecuteError(Exception):
    """QEMU's refusal, as qemu.qmp's clients report it."""

    error_class = "GenericError"


class QMPCmdError(Exception):
    """QEMU's refusal, as avocado-vt's monitor reports it."""

    data: Mapping[str, str] = {"class": "GenericError", "desc": "no such thing"}


class Answers:
    """The answers of a QEMU, and the commands that it was sent."""

    def __init__(self, *, threads: tuple[int, ...] = (os.getpid(),), wrapped: bool = False) -> None:
        self.threads = threads
        self.wrapped = wrapped
        self.sent: list[tuple[str, Mapping[str, Any]]] = []
        self.error: Exception | None = None

    def answer(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
        self.sent.append((command, arguments or {}))
        if self.error and command == "stop":
            raise self.error
        found = {
            "query-version": VERSION,
            "query-cpus-fast": [{"thread-id": thread} for thread in self.threads],
        }.get(command, {})
        return {"return": found} if self.wrapped else found


class QEMUMachine(Answers):
    name = "vm-1"

    def cmd(self, cmd: str, args_dict: Mapping[str, Any] | None = None, **args: Any) -> Any:
        assert not args or args_dict is None
        return self.answer(cmd, args_dict or args)


class QEMUMonitorProtocol(Answers):
    def cmd(self, cmd: str, **arguments: Any) -> Any:
        return self.answer(cmd, arguments)


class QMPMonitor(Answers):
    """avocado-vt's monitor, which writes to the test's log unless `debug` is False."""

    def cmd(
        self,
        cmd: str,
        args: Mapping[str, Any] | None = None,
        timeout: float = 30,
        debug: bool = True,
    ) -> Any:
        assert timeout == 30
        assert not debug
        return self.answer(cmd, args)


class QMPClient(Answers):
    async def execute(
        self, cmd: str, arguments: Mapping[str, Any] | None = None, oob: bool = False
    ) -> Any:
        assert not oob
        return self.answer(cmd, arguments)


class VirtualMachine:
    """avocado-vt's VM, which has a monitor."""

    def __init__(self, monitor: QEMUMachine, pid: int) -> None:
        self.monitor = monitor
        self._pid = pid

    def get_pid(self) -> int:
        return self._pid


async def executed(client: AnyQemu, command: str = "stop", **arguments: Any) -> Any:
    async with borrow("source QEMU", client, timeout_s=5) as qemu:
        return await qemu.qmp.execute(command, **arguments)


@pytest.mark.parametrize("kind", [QEMUMachine, QEMUMonitorProtocol, QMPMonitor, QMPClient])
@pytest.mark.parametrize("wrapped", [False, True], ids=["result", "response"])
def test_arguments_and_answers_pass_through_each_kind_of_client(
    kind: Callable[..., Any], wrapped: bool
) -> None:
    client = kind(wrapped=wrapped)
    assert asyncio.run(executed(client, "human-monitor-command", command_line="info")) == {}
    assert client.sent[-1] == ("human-monitor-command", {"command-line": "info"})
    asyncio.run(executed(client))
    assert client.sent[-1] == ("stop", {})


@pytest.mark.parametrize("error", [ExecuteError("no such thing"), QMPCmdError("no such thing")])
def test_a_refusal_is_distinguished_from_a_lost_connection(error: Exception) -> None:
    client = QEMUMachine()
    client.error = error
    with pytest.raises(QmpRefusal, match="source QEMU refused stop: no such thing"):
        asyncio.run(executed(client))
    client.error = ConnectionResetError("gone")
    with pytest.raises(QmpError, match=r"could not execute stop: ConnectionResetError: gone") as it:
        asyncio.run(executed(client))
    assert not isinstance(it.value, QmpRefusal)


def test_a_response_with_an_error_is_a_refusal() -> None:
    class Raw(QEMUMachine):
        def answer(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
            if command == "stop":
                return {"error": {"class": "GenericError", "desc": "not now"}, "id": "7"}
            return super().answer(command, arguments)

    with pytest.raises(QmpRefusal, match="not now"):
        asyncio.run(executed(Raw()))


def test_the_process_is_that_of_the_vcpus() -> None:
    async def pid_of(client: AnyQemu) -> tuple[int, str, str]:
        async with borrow("source QEMU", client) as qemu:
            return qemu.pid, qemu.address, qemu.version

    assert asyncio.run(pid_of(QEMUMachine())) == (os.getpid(), "QEMUMachine vm-1", "10.0.2 v10")
    behind_a_shell = VirtualMachine(QEMUMachine(), os.getppid())
    assert asyncio.run(pid_of(behind_a_shell))[:2] == (os.getpid(), "VirtualMachine")
    without_vcpus = VirtualMachine(QEMUMachine(threads=()), 4711)
    assert asyncio.run(pid_of(without_vcpus))[0] == 4711


def test_threads_of_no_process_or_of_several_name_no_process() -> None:
    assert process_of_vcpus([]) == 0
    assert process_of_vcpus([os.getpid(), os.getppid()]) == 0
    assert process_of_vcpus([1 << 30]) == 0
    with_a_thread = threading.Event()
    threads: list[int] = []

    def wait() -> None:
        threads.append(threading.get_native_id())
        with_a_thread.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    while not threads:
        pass
    assert process_of_vcpus([*threads, os.getpid()]) == os.getpid()
    with_a_thread.set()
    thread.join()


def test_a_human_monitor_is_refused() -> None:
    class HumanMonitor(QEMUMachine):
        def answer(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
            return "unknown command: 'query-version'"

    with pytest.raises(UsageError, match=r"a human monitor \(HMP\) does not suffice"):
        asyncio.run(executed(HumanMonitor()))


@pytest.mark.parametrize(
    "answer", [{}, {"qemu": None}, {"id": 1}, {"return": 7}, {"qemu": {}, "package": ""}]
)
def test_an_answer_that_is_not_qemus_is_refused(answer: object) -> None:
    class Other:
        def cmd(self, name: str) -> object:
            return answer

    with pytest.raises(UsageError, match=r"QEMU: .*(returned|expected)"):
        asyncio.run(executed(Other()))


@pytest.mark.parametrize("error", ["no such thing", {"class": "GenericError"}])
def test_a_response_with_an_error_of_another_form_is_a_refusal(error: object) -> None:
    class Other(QEMUMachine):
        def answer(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
            found = super().answer(command, arguments)
            return {"error": error} if command == "stop" else found

    with pytest.raises(QmpRefusal, match=r"QEMU refused stop: .*(no such thing|GenericError)"):
        asyncio.run(executed(Other()))


@pytest.mark.parametrize("pid", [True, -1, 0, "7", None, ZeroDivisionError])
def test_a_client_that_does_not_know_its_process_is_accepted(pid: Any) -> None:
    class Other(QEMUMachine):
        def get_pid(self) -> Any:
            if isinstance(pid, type):
                raise pid
            return pid

    async def process() -> int:
        async with borrow("QEMU", Other(threads=())) as qemu:
            return qemu.pid

    assert asyncio.run(process()) == 0


def test_an_object_without_qmp_is_refused() -> None:
    for given in (object(), 7, None):
        with pytest.raises(UsageError, match=r"^side: expected .* a method cmd\(\) or execute\(\)"):
            require_openable("side", given)


def test_an_asynchronous_client_is_recognized() -> None:
    assert is_asynchronous(QMPClient())
    assert not any(map(is_asynchronous, (QEMUMachine(), QEMUMonitorProtocol(), "/run/qmp")))


def test_a_client_that_never_answers_blocks_neither_the_check_nor_the_end_of_the_program() -> None:
    released = threading.Event()

    class Stuck(QEMUMachine):
        def answer(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
            released.wait()

    async def wait() -> None:
        async with borrow("source QEMU", Stuck(), timeout_s=0.05):
            pass

    with pytest.raises(QmpTimeoutError, match="source QEMU has not answered query-version"):
        asyncio.run(wait())
    assert any(each.daemon for each in threading.enumerate() if each.name == "dmaproof-call")
    released.set()


def test_a_stop_iteration_ends_the_wait_for_a_call_in_a_thread() -> None:
    with pytest.raises(RuntimeError, match="StopIteration: 3"):
        asyncio.run(in_daemon_thread(_stop))


def _stop() -> None:
    raise StopIteration(3)


def test_a_call_in_a_thread_passes_on_its_error() -> None:
    def fail(text: str) -> None:
        raise LookupError(text)

    with pytest.raises(LookupError, match="lost"):
        asyncio.run(in_daemon_thread(fail, "lost"))
