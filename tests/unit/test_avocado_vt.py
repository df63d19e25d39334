"""When RAM is compared, with VMs that call the wrapped methods as avocado-vt's VM does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from avocado.core import exceptions

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.integrations import avocado_vt


class Log:
    """Keeps the messages of a test's log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str) -> None:
        self.lines.append(line)


class AvocadoTest:
    """The part of avocado's Test that is used."""

    def __init__(self) -> None:
        self.log = Log()


class Monitor:
    """A QMP monitor; that of a destination may answer 'active' at first."""

    def __init__(self, name: str, *states: str) -> None:
        self.name, self.states = name, list(states)

    def cmd(self, command: str, debug: bool) -> dict[str, str]:
        assert (command, debug) == ("query-migrate", False)
        return {"status": self.states.pop(0) if len(self.states) > 1 else self.states[0]}


class Vm:
    """A VM whose methods do what a test has given."""

    def __init__(self, name: str, *states: str, **params: str) -> None:
        self.name, self.params = name, params
        self.monitors = [Monitor(name, *states)] if states else []
        self.has_succeeded = True

    def get_monitors_by_type(self, kind: str) -> list[Monitor]:
        assert kind == "qmp"
        return self.monitors

    def mig_succeeded(self) -> bool:
        return self.has_succeeded


Compared = list[tuple[str, str, str]]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """The comparisons: the names of source and destination, and of the report."""
    compared: Compared = []

    def check_ram(test: object, source: Any, destination: Any, report_name: str) -> None:
        compared.append((source.name, destination.name, report_name))

    monkeypatch.setattr(avocado_vt, "check_ram", check_ram)
    return compared


@pytest.fixture
def checks() -> Any:
    return avocado_vt._Checks(AvocadoTest())


def start(checks: Any, destination: Vm, source: Vm) -> None:
    checks.create(destination, lambda vm, mac_source: None, mac_source=source)


def end(checks: Any, source: Vm) -> bool:
    return bool(checks.mig_finished(source, lambda vm: True))


def migration(checks: Any, destination: Vm, then: Callable[[Vm], Any] = lambda vm: None) -> Any:
    """Return a `migrate` that starts `destination`, waits for the migration, and does `then`."""

    def migrate(vm: Vm) -> Any:
        start(checks, destination, vm)
        assert not checks.mig_finished(vm, lambda vm: False)
        assert vm in checks._migrations, "RAM is not compared yet"
        assert end(checks, vm)
        return then(vm)

    return migrate


def test_ram_is_compared_once_after_the_wait(checks: Any, compared: Compared) -> None:
    source = Vm("source", "completed")
    destination = Vm("destination", "active", "completed")

    def then(vm: Vm) -> None:
        assert len(compared) == 1, "before the source is destroyed"
        end(checks, vm)

    checks.migrate(source, migration(checks, destination, then))
    assert destination.monitors[0].states == ["completed"], "dmaproof waits for the destination"
    back = Vm("back", "completed")
    checks.migrate(destination, migration(checks, back))
    assert compared == [("source", "destination", "ram"), ("destination", "back", "ram-2")]


def test_a_failure_is_raised_when_avocado_vt_has_finished(
    checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[Vm] = []
    for failure in (
        exceptions.TestFail("1 page differs"),
        UntestableError("memory cannot be read"),
    ):
        monkeypatch.setattr(avocado_vt, "check_ram", _raiser(failure))
        with pytest.raises(type(failure)):
            checks.migrate(
                Vm("source", "completed"),
                migration(checks, Vm("destination", "completed"), finished.append),
            )
    assert len(finished) == 2


def _raiser(failure: Exception) -> Callable[..., None]:
    def check_ram(*arguments: object, **named: object) -> None:
        raise failure

    return check_ram


def test_a_migration_that_the_test_waits_for_is_compared_in_its_wait(
    checks: Any, compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failure in (None, exceptions.TestFail("1 page differs")):
        source, destination = Vm("source", "completed"), Vm("destination", "completed")

        def migrate(vm: Vm, destination: Vm = destination) -> Vm:
            start(checks, destination, vm)
            return destination

        assert checks.migrate(source, migrate) is destination
        if failure is None:
            assert end(checks, source)
            assert compared == [("source", "destination", "ram")]
            continue
        monkeypatch.setattr(avocado_vt, "check_ram", _raiser(failure))
        with pytest.raises(exceptions.TestFail):
            end(checks, source)


def test_a_migration_through_a_file_is_compared_when_the_destination_has_started(
    checks: Any, compared: Compared
) -> None:
    source, destination = Vm("source", "completed"), Vm("destination", "completed")

    def migrate(vm: Vm) -> None:
        end(checks, vm)
        assert not compared
        start(checks, destination, vm)

    checks.migrate(source, migrate)
    assert compared == [("source", "destination", "ram")]


def test_a_destination_on_another_host_is_reported(checks: Any) -> None:
    source = Vm("source", "completed")
    with pytest.raises(UntestableError, match="has not started its destination"):
        checks.migrate(source, lambda vm: end(checks, vm) and None)
    checks.migrate(source, lambda vm: Vm("dead clone"))
    with pytest.raises(UntestableError, match="has not started its destination"):
        end(checks, source)


def test_a_cancelled_or_failed_migration_is_not_compared(checks: Any, compared: Compared) -> None:
    source, destination = Vm("source", "completed"), Vm("destination", "active")
    checks.migrate(source, lambda vm: start(checks, destination, vm))
    assert "cancelled" in checks._test.log.lines[-1]

    def fail(vm: Vm) -> None:
        start(checks, destination, vm)
        vm.has_succeeded = False
        end(checks, vm)
        raise OSError("migration failed")

    with pytest.raises(OSError, match="migration failed"):
        checks.migrate(source, fail)
    source.has_succeeded = True
    end(checks, source)  # of a migration that is not checked
    assert not compared


def test_a_vm_that_runs_at_once_or_has_no_qmp_monitor_is_refused_before_the_migration(
    checks: Any,
) -> None:
    with pytest.raises(UsageError, match="set qemu_stop = on"):
        checks.migrate(Vm("source", "completed", qemu_stop="off"), pytest.fail)
    with pytest.raises(UsageError, match="no QMP monitor"):
        checks.migrate(Vm("source"), pytest.fail)


def test_other_kinds_of_vms_are_refused() -> None:
    with pytest.raises(UsageError, match="vm_type is 'libvirt'"):
        avocado_vt.check_migrations(SimpleNamespace(params={"vm_type": "libvirt"}))
