"""Change a byte of the destination's RAM when a migration has completed, like a lost page."""

from __future__ import annotations

import os
from typing import Any

from virttest.qemu_vm import VM

_create, _mig_succeeded = VM.create, VM._mig_succeeded
_destinations: dict[Any, Any] = {}


def spoil_migrations(gpa: int) -> None:
    """Change the byte at `gpa` of the destination in each migration from now on."""

    def create(vm: Any, *arguments: Any, **named: Any) -> None:
        _create(vm, *arguments, **named)
        if "mac_source" in named:
            _destinations[named["mac_source"]] = vm

    def mig_succeeded(vm: Any, status: Any) -> bool:
        has_succeeded = bool(_mig_succeeded(vm, status))
        if has_succeeded and vm in _destinations:
            _spoil(_destinations.pop(vm), gpa)
        return has_succeeded

    VM.create = create
    VM._mig_succeeded = mig_succeeded  # VM.mig_finished calls it, with or without a check


def _spoil(destination: Any, gpa: int) -> None:
    destination.wait_for_status("paused", 60, step=0.1)
    answer = destination.monitor.human_monitor_cmd(f"gpa2hva {gpa:#x}")
    memory = os.open(f"/proc/{destination.get_pid()}/mem", os.O_WRONLY)
    try:
        os.pwrite(memory, b"!", int(answer.split()[-1], 16))
    finally:
        os.close(memory)
