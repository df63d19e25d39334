"""Follows a migration that somebody else started: how far it is, how fast, and when it will end.

QEMU stops the guest once what remains can be sent within the downtime limit. Until then the dirty
pages come in as fast as the guest writes, so what remains shrinks by the difference of both rates;
where that is not positive the migration does not converge, and that is what is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ..arguments import require
from ..qemu.machine import MIB
from ..qemu.qemu import Qemu
from .migration import Progress, parse_progress


@dataclass(frozen=True)
class View:
    """One look at the migration; `downtime_limit_s` is what QEMU was set to."""

    progress: Progress
    downtime_limit_s: float | None

    @property
    def is_over(self) -> bool:
        """Whether the migration has come to its end."""
        return self.progress.is_over

    @property
    def bytes_per_s(self) -> float | None:
        """The bandwidth that is used; None while QEMU has not measured it."""
        rate = self.progress.mbit_per_s
        return rate * 1e6 / 8 if rate else None

    @property
    def dirty_bytes_per_s(self) -> int | None:
        """How fast the guest dirties RAM; None before the second bitmap sync."""
        pages, page_bytes = self.progress.dirty_pages_per_s, self.progress.page_bytes
        return pages * page_bytes if pages is not None and page_bytes else None

    @property
    def ends_in(self) -> str | None:
        """When the guest will be stopped, in words; None where QEMU does not tell enough."""
        rate, remaining = self.bytes_per_s, self.progress.remaining
        if self.progress.status != "active" or not rate or remaining is None:
            return None
        short_of = remaining - rate * (self.downtime_limit_s or 0)
        if short_of <= 0:
            return "at once"
        net = rate - (self.dirty_bytes_per_s or 0)
        if net <= 0:
            return "never: dirtied faster than sent"
        return f"in {short_of / net:.1f} s"

    def columns(self) -> dict[str, str]:
        """What there is to tell, by name."""
        progress = self.progress
        told = {
            "status": progress.status,
            "elapsed": _unit(progress.elapsed_s, "s", 1),
            "pass": str(progress.syncs) if progress.syncs else None,
            "sent": _unit(_mib(progress.transferred), "MiB", 0),
            "remaining": _unit(_mib(progress.remaining), "MiB", 1),
            "bandwidth": _unit(_mib(self.bytes_per_s), "MiB/s", 1),
            "dirty rate": _unit(_mib(self.dirty_bytes_per_s), "MiB/s", 1),
            "end": self.ends_in,
        }
        if progress.downtime_s is not None and self.is_over:
            told["downtime"] = f"{progress.downtime_s * 1000:.0f} ms"
        elif progress.expected_downtime_s is not None:
            told["expected downtime"] = f"{progress.expected_downtime_s * 1000:.0f} ms"
        return {name: value for name, value in told.items() if value is not None}

    @property
    def line(self) -> str:
        """The same in one line."""
        status, *rest = self.columns().items()
        return ", ".join([status[1], *(f"{name} {value}" for name, value in rest)])


def _mib(amount: float | None) -> float | None:
    return None if amount is None else amount / MIB


def _unit(value: float | None, unit: str, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f} {unit}"


async def watch(qemu: Qemu, interval_s: float) -> AsyncIterator[View]:
    """Looks at the migration every `interval_s` until it is over; waits for one to begin.

    Raises:
        QmpError: QEMU goes away, or does not know migrations.
    """
    require("qemu", qemu, Qemu, "a QEMU from start_qemu() or attach()")
    require("interval_s", interval_s, (int, float), "seconds")
    began_s = time.monotonic()
    number = 0
    while True:
        progress = parse_progress(await qemu.qmp.execute("query-migrate"))
        parameters = await qemu.qmp.execute("query-migrate-parameters")
        limit_ms = parameters.get("downtime-limit")
        view = View(progress, None if limit_ms is None else limit_ms / 1000)
        yield view
        if view.is_over:
            return
        number += 1
        await asyncio.sleep(max(0, began_s + number * interval_s - time.monotonic()))
