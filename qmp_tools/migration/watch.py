"""Follow a third party's migration: report its progress, its speed, and when it will end.

QEMU stops the guest when it can send the remaining data within the downtime limit. Until then the
remaining data shrinks at the bandwidth minus the dirty rate. If this difference is not positive,
the migration does not converge, and `View.ends_in` says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from dmaproof.errors import UntestableError

from ..arguments import require
from ..qemu.libvirt_domain import DomainMigratedError
from ..qemu.machine import MIB
from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpClosedError
from .migration import Progress, parse_progress


class SourceEndedError(UntestableError):
    """The source has ended before it had reported how its migration ended."""


@dataclass(frozen=True)
class View:
    """The state of a migration at one moment; `downtime_limit_s` is QEMU's setting.

    If `ended_by_libvirt`, libvirt has ended the source because the migration has completed.
    """

    progress: Progress
    downtime_limit_s: float | None
    ended_by_libvirt: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the migration has ended."""
        return self.progress.is_over

    @property
    def bytes_per_s(self) -> float | None:
        """The used bandwidth in bytes a second; None while QEMU has not measured it."""
        rate = self.progress.mbit_per_s
        return rate * 1e6 / 8 if rate else None

    @property
    def dirty_bytes_per_s(self) -> int | None:
        """The guest's dirty rate in bytes a second; None before the second bitmap sync."""
        pages, page_bytes = self.progress.dirty_pages_per_s, self.progress.page_bytes
        return pages * page_bytes if pages is not None and page_bytes else None

    @property
    def ends_in(self) -> str | None:
        """The time until QEMU will stop the guest, in words; None if QEMU reports too little."""
        rate, remaining = self.bytes_per_s, self.progress.remaining
        if self.progress.status != "active" or not rate or remaining is None:
            return None
        short_of = remaining - rate * (self.downtime_limit_s or 0)
        if short_of <= 0:
            return "at once"
        net = rate - (self.dirty_bytes_per_s or 0)
        if net <= 0:
            return "never: the guest dirties RAM faster than QEMU sends it"
        return f"in {short_of / net:.1f} s"

    def columns(self) -> dict[str, str]:
        """Return the known figures, formatted, by name."""
        progress = self.progress
        figures = {
            "status": progress.status,
            "elapsed": _unit(progress.elapsed_s, "s", 1),
            "pass": str(progress.syncs) if progress.syncs else None,
            "sent": _unit(_mib(progress.transferred), "MiB", 0),
            "remaining": _unit(_mib(progress.remaining), "MiB", 1),
            "bandwidth": _unit(_mib(self.bytes_per_s), "MiB/s", 1),
            "dirty rate": _unit(_mib(self.dirty_bytes_per_s), "MiB/s", 1),
            "end": self.ends_in,
            "source": "ended by libvirt" if self.ended_by_libvirt else None,
        }
        if progress.downtime_s is not None and self.is_over:
            figures["downtime"] = f"{progress.downtime_s * 1000:.0f} ms"
        elif progress.expected_downtime_s is not None:
            figures["expected downtime"] = f"{progress.expected_downtime_s * 1000:.0f} ms"
        return {name: value for name, value in figures.items() if value is not None}

    @property
    def line(self) -> str:
        """The known figures in one line."""
        status, *rest = self.columns().items()
        return ", ".join([status[1], *(f"{name} {value}" for name, value in rest)])


def _mib(amount: float | None) -> float | None:
    return None if amount is None else amount / MIB


def _unit(value: float | None, unit: str, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f} {unit}"


async def watch(qemu: Qemu, interval_s: float) -> AsyncIterator[View]:
    """Yield a `View` of the migration every `interval_s` until the migration is over.

    If no migration runs, wait for one to begin. If libvirt ends QEMU because the migration has
    completed, the last view says so.

    Raises:
        SourceEndedError: QEMU ended before it had reported the end of the migration.
        QmpError: QEMU does not answer, or does not support migration.
    """
    require("qemu", qemu, Qemu, "a QEMU from start_qemu() or attach()")
    require("interval_s", interval_s, (int, float), "seconds")
    began_s = time.monotonic()
    number = 0
    status = "none"
    while True:
        try:
            view = await _query(qemu)
        except DomainMigratedError as error:
            yield View(parse_progress(error.migration), None, ended_by_libvirt=True)
            return
        except QmpClosedError as error:
            if status == "completed":
                return
            raise SourceEndedError(_ended(qemu, status)) from error
        status = view.progress.status
        yield view
        if view.is_over:
            return
        number += 1
        await asyncio.sleep(max(0, began_s + number * interval_s - time.monotonic()))


async def _query(qemu: Qemu) -> View:
    progress = parse_progress(await qemu.qmp.execute("query-migrate"))
    parameters = await qemu.qmp.execute("query-migrate-parameters")
    limit_ms = parameters.get("downtime-limit")
    return View(progress, None if limit_ms is None else limit_ms / 1000)


def _ended(qemu: Qemu, status: str) -> str:
    if status == "none":
        return f"{qemu.name} ended before a migration began; look at its log"
    return (
        f"{qemu.name} ended while the migration was {status!r}, so dmaproof cannot tell whether it "
        "completed: ask the destination (QMP query-migrate), or let the source run until the "
        "migration is over"
    )
