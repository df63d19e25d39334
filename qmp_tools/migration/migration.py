"""Carry out one migration over QMP, by the `Procedure` of its scenario.

The statistics of query-migrate differ by QEMU version, so every member is optional here. dmaproof
asks each QEMU for its capabilities and never derives them from the version number.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from dmaproof.errors import UnsupportedError, UntestableError, WaitTimeoutError, printable

from ..host.timeout import DEFAULT_TIMEOUT_S, wait_until
from ..qemu import qemu_qmp
from ..qemu.machine import MIB
from ..qemu.qmp import QmpRefusal
from .procedure import HELD_BYTES_PER_S, Procedure
from .transport import Ends

_POLL_S: Final = 0.05
_UNLIMITED_BYTES_PER_S: Final = 1 << 40
_LEAST_BYTES_PER_S: Final = 10
"""QEMU divides its limit by ten (XFER_LIMIT_RATIO), and takes 0 for no limit."""
_PAUSED: Final = "pre-switchover"
_POSTCOPY: Final = "postcopy-ram"
_OVER: Final = frozenset({"completed", "failed", "cancelled"})
"""The states in which a migration has ended."""


class MigrationError(UntestableError):
    """The migration failed, or did not complete."""


class ConnectionLostError(MigrationError):
    """The connection broke in postcopy: each side has a part of the guest's RAM."""


class MigrationTimeoutError(MigrationError, WaitTimeoutError):
    """The migration did not complete in time."""


@dataclass(frozen=True)
class Limits:
    """The bounds of a migration: bandwidth in bytes a second (None: unlimited), and downtime.

    `timeout_s` bounds each wait of a proof, such as the wait for the migration to complete.
    """

    bandwidth_bytes_per_s: int | None = None
    downtime_s: float = 0.3
    timeout_s: float = DEFAULT_TIMEOUT_S


@dataclass(frozen=True)
class Progress:
    """One answer of query-migrate: sizes in bytes, times in seconds; None if QEMU left it out."""

    time_ns: int
    status: str
    syncs: int
    """How often QEMU has synced its dirty bitmap; by the second sync QEMU has sent every page."""
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
    pages_sent: int = 0
    """How many pages QEMU has sent; a page that was sent again counts again."""

    @property
    def is_over(self) -> bool:
        """Whether the migration has ended and its times are known.

        QEMU 7.2 reports 'completed' a moment before it has calculated the times, which are 0 until
        then (migration_completion, migration_calculate_complete).
        """
        return self.status in _OVER and self.elapsed_s != 0

    @property
    def summary(self) -> str:
        """The progress in a few words."""
        parts = [f"pass {max(self.syncs, 1)}"]
        if self.remaining is not None:
            parts.append(f"{self.remaining // MIB} MiB remain")
        if self.mbit_per_s is not None:
            parts.append(f"{self.mbit_per_s:.0f} Mbit/s")
        if self.dirty_pages_per_s:
            parts.append(f"{self.dirty_pages_per_s} dirty pages/s")
        return ", ".join(parts)


def parse_progress(answer: dict[str, Any]) -> Progress:
    """Parse an answer of query-migrate, which has arrived just now."""
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
        error=printable(answer["error-desc"]) if "error-desc" in answer else None,
        elapsed_s=seconds("total-time"),
        page_bytes=ram.get("page-size"),
        pages_sent=ram.get("normal", 0) + ram.get("duplicate", 0),
    )


@dataclass
class Migration:
    """A migration between `ends`; the destination waits with ``-incoming defer``.

    `start` begins the migration with a downtime limit so low that the migration of a busy guest
    does not converge. `hold.PrecopyHold` holds the migration of any guest in precopy. `release`
    sets the limits that the caller asked for. `follow` yields the progress until the migration has
    completed. `exercised` says whether QEMU has used the scenario (`Procedure.exercised_by`).
    `load` waits until the destination has loaded everything.

    `moments` has the times (CLOCK_MONOTONIC, ns) of the source's events: 'STOP' when its vCPUs have
    stopped, and the migration's last states, such as 'device' and 'completed'. `loading_ns` has two
    times: when the destination began to load a stream that was saved first (else 0), and when it
    had loaded everything.
    """

    ends: Ends
    procedure: Procedure
    limits: Limits
    history: list[Progress] = field(default_factory=list)
    moments: dict[str, int] = field(default_factory=dict)
    loading_ns: tuple[int, int] | None = None
    exercised: bool = False
    _bytes_per_s: int = 0
    _deadline: float = 0.0
    _loading: dict[str, int] = field(default_factory=dict)
    """The same as `moments`, for the destination."""

    async def start(self) -> None:
        """Begin the migration and hold it in precopy.

        Raises:
            UnsupportedScenarioError: a QEMU does not support the scenario or rightly refuses it,
                or dmaproof cannot carry it out.
            UnsupportedError: QEMU does not migrate a device of the machine.
            MigrationError: a QEMU accepted a scenario that it must refuse.
            QmpError: a QEMU refused another step.
        """
        try:
            await self._configure()
        except QmpRefusal as refusal:
            # QEMU 7.2 prints its reason for refusing postcopy, but leaves it out of its answer.
            words = f"{refusal}\n{self.ends.printed()}".rstrip()
            raise self.procedure.explain_refusal(words) from refusal
        # With a downtime limit of 0, QEMU takes an empty first pass for convergence.
        await self._set_limits(self.procedure.first_pass_bytes_per_s, downtime_limit=1)
        self.restart_timeout()
        try:
            await self.procedure.begin(self.ends)
        except QmpRefusal as refusal:
            if (await self.ends.source.execute("query-migrate")).get("blocked-reasons"):
                raise UnsupportedError(
                    f"QEMU does not migrate one of the machine's devices: {refusal}"
                ) from refusal
            if not self.procedure.user_options:
                raise
            raise self.procedure.explain_refusal(str(refusal)) from refusal
        if self.procedure.is_over_when_begun:
            answer = await self.ends.destination.execute("query-migrate")
            self.history.append(parse_progress(answer))

    async def _configure(self) -> None:
        procedure = self.procedure
        qemus = procedure.configured(self.ends)
        capabilities = [
            {"capability": name, "state": True} for name in ("events", *procedure.capabilities)
        ]
        for qmp in qemus:
            await qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        await procedure.set_up(self.ends)
        for qmp in qemus:
            await qmp.execute("migrate-set-parameters", **procedure.parameters)

    async def limit_bandwidth(self, bytes_per_s: int) -> None:
        """Limit the source's bandwidth to `bytes_per_s`, or to `limits` if these are lower.

        Changes of less than 10 % are not sent to QEMU.
        """
        if not 0.9 < self._allowed(bytes_per_s) / (self._bytes_per_s or 1) < 1.1:
            await self._set_limits(bytes_per_s)

    async def _set_limits(self, bytes_per_s: int, **others: int) -> None:
        self._bytes_per_s = self._allowed(bytes_per_s)
        await self.ends.source.execute(
            "migrate-set-parameters", max_bandwidth=self._bytes_per_s, **others
        )

    def _allowed(self, bytes_per_s: int) -> int:
        return max(_LEAST_BYTES_PER_S, min(self._bandwidth_bytes_per_s, bytes_per_s))

    @property
    def held_bytes_per_s(self) -> int:
        """The bandwidth at which the migration stays in precopy, if the guest dirties enough."""
        return self.procedure.held_bytes_per_s if self.exercised else HELD_BYTES_PER_S

    def has_sent_all(self, progress: Progress, first_sync: int = 0) -> bool:
        """Return whether QEMU has sent every page at least once since its sync `first_sync`.

        By the second bitmap sync after that it has. But if RAM can also be sent after the precopy,
        QEMU syncs many times in its first pass (migration_iteration_run). QEMU takes dirty pages in
        the order of their addresses, and all of them are dirty at first. So it sends each page once
        before it sends any page for a second time.
        """
        if _POSTCOPY not in self.procedure.capabilities:
            return progress.syncs >= first_sync + 2
        pages = (progress.total or 0) // (progress.page_bytes or 1)
        return 0 < pages <= progress.pages_sent

    def restart_timeout(self) -> None:
        """Restart the timeout, after the migration or the guest has made progress."""
        self._deadline = time.monotonic() + self.limits.timeout_s

    async def start_postcopy(self) -> None:
        """Let the destination take over and fetch the pages that it lacks.

        The bandwidth limit of the precopy stays, so that pages are left for the postcopy.
        """
        await self.ends.source.execute("migrate-start-postcopy")
        self.restart_timeout()

    async def release(self) -> None:
        """Let the migration end as soon as `limits` allow."""
        await self._set_limits(
            self._bandwidth_bytes_per_s,
            downtime_limit=max(1, round(self.limits.downtime_s * 1000)),
        )
        self.restart_timeout()

    @property
    def _bandwidth_bytes_per_s(self) -> int:
        return self.limits.bandwidth_bytes_per_s or _UNLIMITED_BYTES_PER_S

    async def follow(self) -> AsyncGenerator[Progress, None]:
        """Yield the progress at short intervals until the migration has completed.

        Raises:
            MigrationTimeoutError: the migration timed out.
            MigrationError: the migration failed or was cancelled.
        """
        if self.procedure.is_over_when_begun:  # the source has ended
            return
        source, destination = self.ends.source, self.ends.destination
        async with (
            source.events("STOP", "MIGRATION") as listener,
            destination.events("MIGRATION") as loading,
        ):
            async for progress in self._poll_past_pause():
                self.moments |= _moments(listener)
                self._loading |= _moments(loading)
                yield progress

    async def _poll(self) -> AsyncGenerator[Progress, None]:
        self.restart_timeout()
        while True:
            answer = await self.ends.source.execute("query-migrate")
            progress = parse_progress(answer)
            self.exercised = self.exercised or self.procedure.is_exercised_in(answer)
            self.history.append(progress)
            yield progress
            if progress.status == "completed" and progress.is_over:
                return
            if progress.is_over:
                raise MigrationError(
                    f"the migration {progress.status}: {progress.error or 'QEMU gave no reason'}\n"
                    f"{self.ends.printed()}".rstrip()
                )
            if progress.status == "postcopy-paused" and not self.procedure.breaks_connection:
                reason = progress.error or "QEMU gave no reason"
                raise ConnectionLostError(
                    "the connection broke after the switchover to postcopy, before all pages had "
                    f"arrived: {reason}\n{self.ends.printed()}".rstrip()
                )
            if time.monotonic() > self._deadline:
                unused = f" (QEMU has not reported any {self.procedure.exercised_by})"
                raise MigrationTimeoutError(
                    f"the migration has not completed within {self.limits.timeout_s:g} s (its "
                    f"status is {progress.status!r}, {progress.remaining} bytes remain after "
                    f"{progress.syncs} syncs); allow more bandwidth, downtime or time"
                    + ("" if self.exercised else unused)
                )
            await asyncio.sleep(_POLL_S)

    async def _poll_past_pause(self) -> AsyncGenerator[Progress, None]:
        """Poll, and continue a migration that pauses because of pause-before-switchover."""
        paused = False
        async for progress in self._poll():
            if progress.status == _PAUSED and not paused:
                paused = True
                await self.ends.source.execute("migrate-continue", state=_PAUSED)
            yield progress

    async def cancel(self) -> None:
        """Cancel, and wait until the source has released the migration and its devices' logs.

        After that, the destination ends by itself, or the caller may end it.

        Raises:
            MigrationError: the migration ended in another state.
        """
        await self.ends.source.execute("migrate_cancel")
        await self._wait_for_end("cancelled")

    async def pause_before_switchover(self) -> None:
        """Wait until the source has paused its guest and sent all but the last pages.

        The capability pause-before-switchover must be set; the migration stays in this state.

        Raises:
            MigrationError: the migration does not reach this state.
        """
        await self.release()
        async with contextlib.aclosing(self._poll()) as precopy:
            async for progress in precopy:
                if progress.status == _PAUSED:
                    return
        raise MigrationError(
            "the migration has completed, although the capability pause-before-switchover was set"
        )

    async def fail(self) -> None:
        """Wait until the migration has failed without its destination, and the source runs again.

        Raises:
            MigrationError: the migration ended in another state, or the guest stays paused.
        """
        await self._wait_for_end("failed")
        status = ""

        async def is_running() -> bool:
            nonlocal status
            status = (await self.ends.source.execute("query-status"))["status"]
            return bool(status == "running")

        def late() -> MigrationTimeoutError:
            return MigrationTimeoutError(
                f"the migration failed as expected, but the source did not continue its guest "
                f"within {self.limits.timeout_s:g} s: the source is {status!r}; look at its log"
            )

        await wait_until(is_running, self.limits.timeout_s, late, _POLL_S)

    async def _wait_for_end(self, end: str) -> None:
        try:
            async for _ in self._poll_past_pause():
                pass
        except MigrationTimeoutError:
            raise
        except MigrationError:
            pass  # the migration has ended; its state is checked next
        if (status := self.history[-1].status) != end:
            raise MigrationError(f"expected the migration to be {end!r}, but it is {status!r}")

    async def load(self) -> None:
        """Wait until the destination has loaded everything and its guest is paused.

        The destination begins to read a stream that was saved first only now.

        Raises:
            MigrationError: the destination does not reach this state.
        """
        async with self.ends.destination.events("MIGRATION") as loading:
            began_ns = time.monotonic_ns() if self.procedure.transport.saved_first else 0
            await self._load()
            self._loading |= _moments(loading)
        self.loading_ns = began_ns, self._loading.get("completed", time.monotonic_ns())

    async def _load(self) -> None:
        await self.procedure.load(self.ends)

        async def is_paused() -> bool:
            status = (await self.ends.destination.execute("query-status"))["status"]
            if status not in ("paused", "inmigrate", "prelaunch", "finish-migrate"):
                raise MigrationError(f"expected the destination to be paused, but it is {status!r}")
            return bool(status == "paused")

        late = MigrationTimeoutError(
            f"the destination has not loaded everything within {self.limits.timeout_s:g} s; "
            "allow more time (--timeout)"
        )
        await wait_until(is_paused, self.limits.timeout_s, lambda: late, _POLL_S)


def _moments(listener: qemu_qmp.EventListener) -> dict[str, int]:
    """Return the times of the events received so far, by event name or migration state."""
    to_monotonic_ns = time.monotonic_ns() - time.time_ns()
    found = {}
    for event in cast(list[Mapping[str, Any]], listener.clear()):
        stamp = event["timestamp"]
        time_ns = stamp["seconds"] * 1_000_000_000 + stamp["microseconds"] * 1000
        name = event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        found[name] = time_ns + to_monotonic_ns
    return found
