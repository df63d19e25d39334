"""avocado-vt: compare all RAM in each ``vm.migrate()`` of a test, such as those of tp-qemu.

::

    from qmp_tools.integrations.avocado_vt import check_migrations

    def run(test, params, env):
        check_migrations(test)
        ...
        vm.migrate()

`VM.migrate` (virttest/qemu_vm.py, 113.0) starts the destination with -S, waits until the migration
has completed, ends the source, and continues the destination. Between the wait and the end of the
source both guests are paused and both QEMUs run. dmaproof compares their RAM then, through the
monitors that avocado-vt has opened. Three methods of the class `VM` are wrapped for this:

- `create` shows which VM is the destination: it is called with the source as `mac_source`.
- `mig_finished`, which the wait calls, shows that the migration has completed. `create` follows if
  the migration goes through a file. RAM is compared at the end of the later one of both.
- `migrate` fails the test, after it has ended the source and continued the destination as always.
  avocado-vt then finds its VMs in the state that it expects.

Each test of avocado-vt runs in a process of its own, so the class need not be restored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from avocado import Test
from avocado.core.exceptions import TestFail
from virttest import utils_misc
from virttest.qemu_vm import VM

from dmaproof.errors import DmaproofError, UntestableError, UsageError

from ..host.timeout import DEFAULT_TIMEOUT_S
from .avocado import check_ram

__all__ = ["check_migrations"]

_WRAPPED: Final = ("create", "mig_finished", "migrate")
_POLL_S: Final = 0.1


def check_migrations(test: Test) -> None:
    """Compare all RAM in each ``vm.migrate()`` from now on, and fail `test` if pages differ.

    After ``vm.migrate(not_wait_for_migration=True)``, RAM is compared in the call of
    ``vm.wait_for_migration()`` that sees the migration complete. A migration that fails or is
    cancelled is not checked. Each check writes its report to the test's output folder:
    ``ram.json`` and ``ram.html``, then ``ram-2.json`` and ``ram-2.html``, and so on.

    ``vm.migrate()`` raises these in addition:

    - avocado's TestFail: pages differ.
    - UsageError: a parameter of the test has to be changed for a check.
    - UntestableError: RAM could not be compared, for example because the destination is on another
      host.

    Args:
        test: the first argument of the test's function ``run``.

    Raises:
        UsageError: the test's VMs are not those of avocado-vt's type 'qemu'.
    """
    vm_type = test.params.get("vm_type")
    if vm_type != "qemu":
        raise UsageError(
            f"the parameter vm_type is '{vm_type}', but dmaproof can check only VMs of type 'qemu' "
            "in an avocado-vt test; check others with 'dmaproof check'"
        )
    if VM.migrate.__module__ == __name__:
        return  # called before, by the test or by its test_pre_hook
    checks = _Checks(test)
    for name in _WRAPPED:
        setattr(VM, name, _wrapped(getattr(VM, name), getattr(checks, name)))


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    def method(vm: Any, *arguments: Any, **named: Any) -> Any:
        return wrapper(vm, original, *arguments, **named)

    return method


@dataclass
class _Migration:
    destination: Any = None
    has_completed: bool = False
    is_in_migrate: bool = True
    failure: Exception | None = None


class _Checks:
    """The wrappers, and the migrations whose RAM is still to be compared, by their source."""

    def __init__(self, test: Test) -> None:
        self._test = test
        self._migrations: dict[Any, _Migration] = {}
        self._checked = 0

    def migrate(self, vm: Any, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Migrate `vm`, and fail the test afterwards if pages differ."""
        if vm.params.get("qemu_stop", "on") != "on":
            raise UsageError(
                f"the parameter qemu_stop is '{vm.params['qemu_stop']}', so {vm.name} would run on "
                "the destination before its RAM can be compared: set qemu_stop = on"
            )
        _qmp_monitor(vm)
        migration = self._migrations[vm] = _Migration()
        try:
            clone = original(vm, *arguments, **named)
        except BaseException:
            self._migrations.pop(vm, None)
            raise
        migration.is_in_migrate = False
        if clone is not None:
            self._test.log.info("vm.wait_for_migration() will compare the RAM of both sides")
            return clone
        if self._migrations.pop(vm, None) is None:
            if migration.failure is not None:
                raise migration.failure
        elif migration.has_completed:
            raise _no_destination(vm)
        else:
            self._test.log.info("the migration was cancelled, so there is no RAM to compare")
        return None

    def mig_finished(self, vm: Any, original: Callable[..., bool]) -> bool:
        """Return whether the migration of `vm` has ended, and compare RAM if it has completed."""
        has_ended = original(vm)
        migration = self._migrations.get(vm)
        if has_ended and migration is not None and vm.mig_succeeded():
            migration.has_completed = True
            if migration.destination is not None:
                self._check(vm)
            elif not migration.is_in_migrate:
                del self._migrations[vm]
                raise _no_destination(vm)
        return has_ended

    def create(self, vm: Any, original: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Start `vm`; if it is the destination of a completed migration, compare its RAM."""
        original(vm, *arguments, **named)
        source = named.get("mac_source")
        if (migration := self._migrations.get(source)) is not None:
            migration.destination = vm
            if migration.has_completed:
                self._check(source)

    def _check(self, source: Any) -> None:
        migration = self._migrations.pop(source)
        sides = [_qmp_monitor(vm) for vm in (source, migration.destination)]

        def destination_has_completed() -> bool:  # a moment after the source
            answer = sides[1].cmd("query-migrate", debug=False)
            return bool(answer.get("status") == "completed")

        utils_misc.wait_for(destination_has_completed, DEFAULT_TIMEOUT_S, step=_POLL_S)
        self._checked += 1
        name = "ram" if self._checked == 1 else f"ram-{self._checked}"
        try:
            check_ram(self._test, sides[0], sides[1], report_name=name)
        except (DmaproofError, TestFail) as failure:
            if not migration.is_in_migrate:
                raise
            migration.failure = failure


def _qmp_monitor(vm: Any) -> Any:
    monitors = vm.get_monitors_by_type("qmp")
    if not monitors:
        raise UsageError(
            f"{vm.name} has no QMP monitor: set the parameter monitor_type to 'qmp', or add a "
            "monitor: monitors += ' qmp1', monitor_type_qmp1 = qmp"
        )
    return monitors[0]


def _no_destination(vm: Any) -> UntestableError:
    return UntestableError(
        f"the RAM of {vm.name} was not compared, because the test has not started its "
        "destination: migrate within this host (dest_host='localhost')"
    )
