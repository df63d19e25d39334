"""The reasons for which QEMU does not start L2 or refuses to migrate it, before pages are sent."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence
from typing import Final

from ..qemu.machine import SOURCE
from ..qemu.qmp import QmpError, QmpRefusal, QmpTimeoutError
from .fake_device import fake_device, injected
from .l2 import Plan, TestedQemu, machine_arguments, require_kernel_support, run_l2, tested_qemu
from .outcome import NotSupportedError, require
from .tracking import Tracking

_NOWHERE: Final = "tcp:127.0.0.1:1"
"""Nothing listens there; QEMU looks for reasons to refuse before it connects."""


def refused(plan: Plan, timeout_s: float, *front: str) -> str:
    """Require that QEMU refuses to migrate L2; return its words.

    `front` comes before the devices on QEMU's command line.
    """
    reasons = blocked_reasons(plan, timeout_s, *front)
    require(bool(reasons), "QEMU does not refuse the migration")
    return f"QEMU refuses: {'; '.join(reasons)}"


def blocked_reasons(plan: Plan, timeout_s: float, *front: str) -> list[str]:
    """Return QEMU's reasons for refusing to migrate L2; none if it does not refuse."""
    qemu = tested_qemu(timeout_s)
    require_kernel_support(plan.trackings)
    return asyncio.run(_blocked_reasons(plan, qemu, timeout_s, front))


@functools.cache
def require_migration(tracking: Tracking, timeout_s: float) -> None:
    """Raise NotSupportedError, with QEMU's words, if QEMU refuses to migrate L2 with one device."""
    if reasons := blocked_reasons(Plan((tracking,)), timeout_s):
        raise NotSupportedError(f"QEMU refuses: {'; '.join(reasons)}")


def require_start(plan: Plan, timeout_s: float) -> None:
    """Raise NotSupportedError, with QEMU's words, if QEMU ends instead of starting L2."""
    qemu = tested_qemu(timeout_s)
    require_kernel_support(plan.trackings)
    asyncio.run(_require_start(plan, qemu, timeout_s))


async def _require_start(plan: Plan, qemu: TestedQemu, timeout_s: float) -> None:
    with contextlib.ExitStack() as stack:
        numbers = range(len(plan.trackings))
        devices = {number: stack.enter_context(fake_device(timeout_s)) for number in numbers}
        try:
            async with run_l2(SOURCE, machine_arguments(plan, devices, qemu), timeout_s):
                pass
        except QmpTimeoutError:
            raise
        except QmpError as error:
            first, *_, last = str(error).splitlines()
            raise NotSupportedError(f"{first}: {last.strip()}") from error


async def _blocked_reasons(
    plan: Plan, qemu: TestedQemu, timeout_s: float, front: Sequence[str]
) -> list[str]:
    with contextlib.ExitStack() as stack:
        numbers = range(len(plan.trackings))
        devices = {number: stack.enter_context(fake_device(timeout_s)) for number in numbers}
        stack.enter_context(injected(devices[plan.victim], **plan.faults))
        arguments = machine_arguments(plan, devices, qemu, *front, migration="auto")
        async with run_l2(SOURCE, arguments, timeout_s) as source:
            answer = await source.qmp.execute("query-migrate")
            reasons = [_without_name(reason) for reason in answer.get("blocked-reasons", [])]
            try:
                await source.qmp.execute("migrate", uri=_NOWHERE)
            except QmpRefusal:
                return reasons
            require(not reasons, f"QEMU migrates, though it says that it cannot: {reasons}")
            return []


def _without_name(reason: str) -> str:
    """Return a reason of QEMU without the device's name, which is a new one on each run."""
    return reason.rpartition(": ")[2]
