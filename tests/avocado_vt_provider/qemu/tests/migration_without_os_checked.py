from __future__ import annotations

import time
from typing import Any

from provider.spoil import spoil_migrations

from qmp_tools.integrations.avocado_vt import check_migrations


def counter(vm: Any) -> int:
    """Return the word in RAM that the guest counts up."""
    text = vm.monitor.human_monitor_cmd("xp /1wx 0x1000000")
    return int(text.split(":")[1], 16)


def run(test: Any, params: Any, env: Any) -> None:
    """
    Migrate a guest without an operating system:

    1) Start the guest.
    2) Migrate the guest as often as the parameter ping_pong says.
    3) Check that the guest continues on the last destination.

    :param test: QEMU test object.
    :param params: Dictionary with test parameters.
    :param env: Dictionary with the test environment.
    """
    if params.get("spoil"):
        spoil_migrations(int(params["spoil"], 0))
    check_migrations(test)
    vm = env.get_vm(params["main_vm"])
    vm.verify_alive()

    for _ in range(int(params.get("ping_pong", 1))):
        vm.migrate(
            float(params["mig_timeout"]),
            params.get("migration_protocol", "tcp"),
            offline=params["offline"] == "yes",
            env=env,
        )

    before = counter(vm)
    for _ in range(100):
        time.sleep(0.1)
        if counter(vm) != before:
            return
    test.fail("the guest does not continue on the destination")
