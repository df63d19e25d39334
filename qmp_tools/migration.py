"""One live migration over QMP, in any of the ways of `WAYS`.

Statistics of query-migrate differ by QEMU version, so every member is optional here; what a version
can do is asked of it, never told by its number.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from dmaproof.errors import UntestableError

from .qmp import Qmp

_POLL_S: Final = 0.05
_UNLIMITED_BYTES_PER_S: Final = 1 << 40
# QEMU hands out its bandwidth in portions of a tenth of a second. With these, a portion is less
# than what the guest keeps dirtying (Workload.churn), so no pass can be over in no time: not the
# ones right behind the first (seen: nine passes in 50 ms), and not those while it is held.
_FIRST_PASS_BYTES_PER_S: Final = 128 << 20
_HELD_BYTES_PER_S: Final = 32 << 20
OVER: Final = frozenset({"completed", "failed", "cancelled"})
"""The states in which a migration has come to its end."""


class MigrationError(UntestableError):
    """The migration did not come to its end."""


@dataclass(frozen=True)
class Way:
    """How the migration stream travels.

    `listen_on(folder, host)` is the URI that the destination listens on; `capabilities` are set on
    both sides.
    """

    summary: str
    listen_on: Callable[[Path, str], str]
    capabilities: tuple[str, ...] = ()


WAYS: Final[dict[str, Way]] = {
    "unix": Way(
        "a Unix socket in the run's private folder",
        lambda folder, host: f"unix:{folder / 'destination-migration.sock'}",
    ),
    "tcp": Way("TCP, on a free port", lambda folder, host: f"tcp:{host}:0"),
}


@dataclass(frozen=True)
class Limits:
    """Bounds of a migration: bytes a second (None: unlimited), downtime and whole time."""

    bandwidth_bytes_per_s: int | None = None
    downtime_s: float = 0.3
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Progress:
    """One answer of query-migrate: sizes in bytes, times in seconds; None where QEMU was silent."""

    time_ns: int
    status: str
    syncs: int
    """How often QEMU has synced its dirty bitmap; with the second sync every page has been sent."""
    total: int | None
    remaining: int | None
    transferred: int | None
    dirty_pages_per_s: int | None
    mbit_per_s: float | None
    expected_downtime_s: float | None
    downtime_s: float | None
    error: str | None
    elapsed_s: float | None = None
    page_bytes: int | None = None


def parse_progress(answer: dict[str, Any]) -> Progress:
    """What an answer of query-migrate says, now."""
    ram = answer.get("ram", {})

    def seconds(member: str) -> float | None:
        return answer[member] / 1000 if member in answer else None

    return Progress(
        time_ns=time.monotonic_ns(),
        status=answer.get("status", "none"),
        syncs=ram.get("dirty-sync-count", 0),
        total=ram.get("total"),
        remaining=ram.get("remaining"),
        transferred=ram.get("transferred"),
        dirty_pages_per_s=ram.get("dirty-pages-rate"),
        mbit_per_s=ram.get("mbps"),
        expected_downtime_s=seconds("expected-downtime"),
        downtime_s=seconds("downtime"),
        error=answer.get("error-desc"),
        elapsed_s=seconds("total-time"),
        page_bytes=ram.get("page-size"),
    )


@dataclass
class Migration:
    """A migration from `source` to `destination`, which waits with ``-incoming defer``.

    `start` begins it with a downtime limit so low that a busy guest does not converge; `hold` slows
    it down once its first pass is over; `release` sets the limits that were asked for. In between,
    `follow` shows a precopy for as long as the caller has something to do in it.

    `moments` has the times (CLOCK_MONOTONIC, ns) of the source's events: 'STOP' when its vCPUs have
    stopped, and the migration's last states, such as 'device' and 'completed'.
    """

    source: Qmp
    destination: Qmp
    way: Way
    folder: Path
    limits: Limits
    host: str = "127.0.0.1"
    history: list[Progress] = field(default_factory=list)
    moments: dict[str, int] = field(default_factory=dict)

    async def start(self) -> None:
        """Begin, and hold the migration in precopy.

        Raises:
            QmpError: a QEMU refused a step.
        """
        for qmp in (self.source, self.destination):
            await qmp.execute(
                "migrate-set-capabilities",
                capabilities=[
                    {"capability": name, "state": True}
                    for name in ("events", *self.way.capabilities)
                ],
            )
        await self.source.execute(
            "migrate-set-parameters",
            max_bandwidth=min(self._bandwidth_bytes_per_s, _FIRST_PASS_BYTES_PER_S),
            downtime_limit=1,  # with 0, QEMU takes an empty first pass for convergence
        )
        await self.destination.execute(
            "migrate-incoming", uri=self.way.listen_on(self.folder, self.host)
        )
        await self.source.execute("migrate", uri=await self._listening_uri())

    async def _listening_uri(self) -> str:
        uri = self.way.listen_on(self.folder, self.host)
        if uri.startswith("tcp:"):
            answer = await self.destination.execute("query-migrate")
            address = answer["socket-address"][0]
            return f"tcp:{address['host']}:{address['port']}"
        return uri

    async def hold(self) -> None:
        """Send slowly: so the migration does not converge, and the guest has the processors."""
        await self.source.execute(
            "migrate-set-parameters",
            max_bandwidth=min(self._bandwidth_bytes_per_s, _HELD_BYTES_PER_S),
        )

    async def release(self) -> None:
        """Let the migration end as soon as the limits allow."""
        await self.source.execute(
            "migrate-set-parameters",
            max_bandwidth=self._bandwidth_bytes_per_s,
            downtime_limit=max(1, round(self.limits.downtime_s * 1000)),
        )

    @property
    def _bandwidth_bytes_per_s(self) -> int:
        return self.limits.bandwidth_bytes_per_s or _UNLIMITED_BYTES_PER_S

    async def follow(self) -> AsyncIterator[Progress]:
        """The progress, again and again until the migration has completed.

        Raises:
            MigrationError: it failed, was cancelled, or took longer than its time.
        """
        async with self.source.events("STOP", "MIGRATION") as listener:
            async for progress in self._poll():
                self._note_moments(cast(list[Mapping[str, Any]], listener.clear()))
                yield progress

    def _note_moments(self, events: Iterable[Mapping[str, Any]]) -> None:
        to_monotonic_ns = time.monotonic_ns() - time.time_ns()
        for event in events:
            stamp = event["timestamp"]
            time_ns = stamp["seconds"] * 1_000_000_000 + stamp["microseconds"] * 1000
            name = event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
            self.moments[name] = time_ns + to_monotonic_ns

    async def _poll(self) -> AsyncIterator[Progress]:
        deadline = time.monotonic() + self.limits.timeout_s
        while True:
            progress = parse_progress(await self.source.execute("query-migrate"))
            self.history.append(progress)
            yield progress
            if progress.status == "completed":
                return
            if progress.status in OVER:
                raise MigrationError(
                    f"the migration {progress.status}: {progress.error or 'QEMU gave no reason'}"
                )
            if time.monotonic() > deadline:
                raise MigrationError(
                    f"the migration has not completed within {self.limits.timeout_s:.0f} s (it is "
                    f"{progress.status!r}, {progress.remaining} bytes remain after "
                    f"{progress.syncs} syncs); allow more bandwidth, downtime or time"
                )
            await asyncio.sleep(_POLL_S)

    async def destination_paused(self) -> None:
        """Wait until the destination has loaded everything and stands paused.

        Raises:
            MigrationError: it does not come to that.
        """
        deadline = time.monotonic() + self.limits.timeout_s
        while time.monotonic() < deadline:
            answer = await self.destination.execute("query-status")
            if answer["status"] == "paused":
                return
            if answer["status"] not in ("inmigrate", "prelaunch", "finish-migrate"):
                raise MigrationError(f"the destination is {answer['status']!r} and not paused")
            await asyncio.sleep(_POLL_S)
        raise MigrationError("the destination has not finished loading")
