"""One migration over QMP, carried out as the `Procedure` of its scenario says.

Statistics of query-migrate differ by QEMU version, so every member is optional here; what a version
can do is asked of it, never told by its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from dmaproof.errors import UntestableError, WaitTimeoutError, printable

from ..host.timeout import DEFAULT_TIMEOUT_S, wait_until
from ..qemu import qemu_qmp
from ..qemu.machine import MIB
from ..qemu.qmp import QmpRefusal
from .procedure import HELD_BYTES_PER_S, Procedure
from .transport import Ends

_POLL_S: Final = 0.05
_UNLIMITED_BYTES_PER_S: Final = 1 << 40
_PAUSED: Final = "pre-switchover"
_OVER: Final = frozenset({"completed", "failed", "cancelled"})
"""The states in which a migration has come to its end."""


class MigrationError(UntestableError):
    """The migration did not come to its end."""


class MigrationTimeoutError(MigrationError, WaitTimeoutError):
    """The migration did not come to its end in time."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a migration: bytes a second (None: unlimited), and downtime.

    `timeout_s` bounds each wait of a proof: for the migration to complete, and for any other thing.
    """

    bandwidth_bytes_per_s: int | None = None
    downtime_s: float = 0.3
    timeout_s: float = DEFAULT_TIMEOUT_S


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

    @property
    def is_over(self) -> bool:
        """Whether the migration has come to its end, and its times are known.

        QEMU 7.2 says 'completed' a moment before it has reckoned them, and has them as 0 until then
        (migration_completion, migration_calculate_complete).
        """
        return self.status in _OVER and self.elapsed_s != 0

    @property
    def summary(self) -> str:
        """How far it is, in a few words."""
        parts = [f"pass {max(self.syncs, 1)}"]
        if self.remaining is not None:
            parts.append(f"{self.remaining // MIB} MiB remain")
        if self.mbit_per_s is not None:
            parts.append(f"{self.mbit_per_s:.0f} Mbit/s")
        if self.dirty_pages_per_s:
            parts.append(f"{self.dirty_pages_per_s} dirty pages/s")
        return ", ".join(parts)


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
        error=printable(answer["error-desc"]) if "error-desc" in answer else None,
        elapsed_s=seconds("total-time"),
        page_bytes=ram.get("page-size"),
    )


@dataclass
class Migration:
    """A migration between `ends`; the destination waits with ``-incoming defer``.

    `start` begins it with a downtime limit so low that a busy guest does not converge;
    `hold.PrecopyHold` sees to it that none does; `release` sets the limits that were asked for. In
    between, `follow` shows a precopy for as long as the caller has something to do in it;
    `exercised` says whether the scenario has been used (`Procedure.exercised_by`). `load` is the
    end on the destination.

    `device_lacks_pagefault` is `AttachedDevice.lacks_pagefault`.

    `moments` has the times (CLOCK_MONOTONIC, ns) of the source's events: 'STOP' when its vCPUs have
    stopped, and the migration's last states, such as 'device' and 'completed'. `loading_ns` is when
    the destination was let load a stream that was saved first (else 0), and when it had loaded all.
    """

    ends: Ends
    procedure: Procedure
    limits: Limits
    history: list[Progress] = field(default_factory=list)
    moments: dict[str, int] = field(default_factory=dict)
    loading_ns: tuple[int, int] | None = None
    exercised: bool = False
    device_lacks_pagefault: bool = False
    _bytes_per_s: int = 0
    _deadline: float = 0.0
    _loading: dict[str, int] = field(default_factory=dict)
    """As `moments`, on the destination."""

    async def start(self) -> None:
        """Begin, and hold the migration in precopy.

        Raises:
            UnsupportedScenarioError: a QEMU lacks what the scenario needs, or refuses it as it
                must; or dmaproof cannot carry it out.
            MigrationError: a QEMU does not refuse what it must.
            QmpError: a QEMU refused another step.
        """
        try:
            await self._configure()
        except QmpRefusal as refusal:
            # QEMU 7.2 prints its reason for refusing postcopy, and does not answer with it.
            words = f"{refusal}\n{self.ends.printed()}".rstrip()
            raise self.procedure.explain_refusal(words) from refusal
        self.procedure.check_acceptance(device_lacks_pagefault=self.device_lacks_pagefault)
        # With a downtime limit of 0, QEMU takes an empty first pass for convergence.
        await self._set_limits(self.procedure.first_pass_bytes_per_s, downtime_limit=1)
        self.restart_timeout()
        await self.procedure.begin(self.ends)
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
        """Have the source send no more than that, nor more than the limits allow.

        Small changes are not worth a command.
        """
        if not 0.9 < self._allowed(bytes_per_s) / (self._bytes_per_s or 1) < 1.1:
            await self._set_limits(bytes_per_s)

    async def _set_limits(self, bytes_per_s: int, **others: int) -> None:
        self._bytes_per_s = self._allowed(bytes_per_s)
        await self.ends.source.execute(
            "migrate-set-parameters", max_bandwidth=self._bytes_per_s, **others
        )

    def _allowed(self, bytes_per_s: int) -> int:
        return max(1, min(self._bandwidth_bytes_per_s, bytes_per_s))

    @property
    def held_bytes_per_s(self) -> int:
        """With how much bandwidth the migration stays in precopy, if the guest dirties enough."""
        return self.procedure.held_bytes_per_s if self.exercised else HELD_BYTES_PER_S

    def restart_timeout(self) -> None:
        """Count the limits' timeout from now: something that takes its time has come about."""
        self._deadline = time.monotonic() + self.limits.timeout_s

    async def release(self) -> None:
        """Let the migration end as soon as the limits allow."""
        await self._set_limits(
            self._bandwidth_bytes_per_s,
            downtime_limit=max(1, round(self.limits.downtime_s * 1000)),
        )
        self.restart_timeout()

    @property
    def _bandwidth_bytes_per_s(self) -> int:
        return self.limits.bandwidth_bytes_per_s or _UNLIMITED_BYTES_PER_S

    async def follow(self) -> AsyncGenerator[Progress, None]:
        """The progress, again and again until the migration has completed.

        Raises:
            MigrationTimeoutError: it took longer than its time.
            MigrationError: it failed, or was cancelled.
        """
        if self.procedure.is_over_when_begun:  # the source is no more
            return
        source, destination = self.ends.source, self.ends.destination
        async with (
            source.events("STOP", "MIGRATION") as listener,
            destination.events("MIGRATION") as loading,
        ):
            async for progress in self._poll():
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
            if time.monotonic() > self._deadline:
                unseen = f" (no {self.procedure.exercised_by} has been seen)"
                raise MigrationTimeoutError(
                    f"the migration has not completed within {self.limits.timeout_s:g} s (it is "
                    f"{progress.status!r}, {progress.remaining} bytes remain after "
                    f"{progress.syncs} syncs); allow more bandwidth, downtime or time"
                    + ("" if self.exercised else unseen)
                )
            await asyncio.sleep(_POLL_S)

    async def cancel(self) -> None:
        """Cancel, and wait until the source has let go of the migration and its devices' logs.

        The destination ends by itself then, or may be ended.

        Raises:
            MigrationError: the migration came to another end.
        """
        await self.ends.source.execute("migrate_cancel")
        await self._come_to("cancelled")

    async def pause_before_switchover(self) -> None:
        """Come to where the source stands still, all but the last pages sent, and stay there.

        The migration must have been told to by the capability of this name.

        Raises:
            MigrationError: it does not come to that.
        """
        await self.release()
        async with contextlib.aclosing(self._poll()) as precopy:
            async for progress in precopy:
                if progress.status == _PAUSED:
                    return
        raise MigrationError("the migration has completed, though it was to pause before")

    async def fail(self) -> None:
        """See the migration fail, as its destination has gone; the source's guest runs again.

        Raises:
            MigrationError: the migration came to another end, or the guest stands still.
        """
        await self._come_to("failed")
        status = ""

        async def runs() -> bool:
            nonlocal status
            status = (await self.ends.source.execute("query-status"))["status"]
            return bool(status == "running")

        def late() -> MigrationTimeoutError:
            return MigrationTimeoutError(
                f"the migration failed, as it was to, but the source is {status!r}, and has not "
                f"run on within {self.limits.timeout_s:g} s"
            )

        await wait_until(runs, self.limits.timeout_s, late, _POLL_S)

    async def _come_to(self, end: str) -> None:
        paused = False
        try:
            async for progress in self._poll():
                if progress.status == _PAUSED and not paused:
                    paused = True
                    await self.ends.source.execute("migrate-continue", state=_PAUSED)
        except MigrationTimeoutError:
            raise
        except MigrationError:
            pass  # it has come to an end, which is looked at now
        if (status := self.history[-1].status) != end:
            raise MigrationError(f"the migration was to be {end}, and is {status!r}")

    async def load(self) -> None:
        """Wait until the destination has loaded everything and stands paused.

        A stream that was saved first is read only now.

        Raises:
            MigrationError: it does not come to that.
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
                raise MigrationError(f"the destination is {status!r} and not paused")
            return bool(status == "paused")

        late = MigrationTimeoutError(
            f"the destination has not loaded everything within {self.limits.timeout_s:g} s"
        )
        await wait_until(is_paused, self.limits.timeout_s, lambda: late, _POLL_S)


def _moments(listener: qemu_qmp.EventListener) -> dict[str, int]:
    """When each of the events that have come happened, by name or by the migration's state."""
    to_monotonic_ns = time.monotonic_ns() - time.time_ns()
    found = {}
    for event in cast(list[Mapping[str, Any]], listener.clear()):
        stamp = event["timestamp"]
        time_ns = stamp["seconds"] * 1_000_000_000 + stamp["microseconds"] * 1000
        name = event["data"]["status"] if event["event"] == "MIGRATION" else event["event"]
        found[name] = time_ns + to_monotonic_ns
    return found
