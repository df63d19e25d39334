"""A snapshot of a moment, which QEMU saves while the guest runs on at the source.

QEMU write-protects the guest's memory and saves a page before it lets a vCPU change it. It does not
hold off what a device outside QEMU writes.
"""

from __future__ import annotations

import shlex
import sys
from typing import Final

from dmaproof.errors import UntestableError

from ...guest.channel import START_WRITE_ONCE
from ..attempt import Attempt
from ..judgement import Blame, EvidenceSource
from ..migration import Progress
from ..procedure import UnsupportedScenarioError
from ..state_refusal import CANNOT_LOAD
from ..transport import cat_from, saved_transport
from .base import Scenario

# QEMU saves a background snapshot without a limit of its own. This reads some 12 MiB a second.
_SLOW_CAT: Final = (
    "import sys, time\n"
    "while piece := sys.stdin.buffer.read(1 << 18):\n"
    "    sys.stdout.buffer.write(piece)\n"
    "    time.sleep(0.02)\n"
)
_EXEC_SLOWLY: Final = saved_transport(
    cat_from,
    lambda file: f"exec:{shlex.join((sys.executable, '-c', _SLOW_CAT))} >{shlex.quote(str(file))}",
)


class BackgroundSnapshot(Scenario):
    """The moment at which the snapshot began, restored at the destination."""

    name = "background-snapshot"
    summary = (
        "the moment saved while the guest runs on; the device writes past QEMU's protection of it"
    )
    transport = _EXEC_SLOWLY
    capabilities = ("background-snapshot",)

    is_held_in_precopy = False
    is_repeatable = False
    downtime_is_measurable = False
    stops_rings = False
    has_journal = False
    blame_without_journal = Blame.SNAPSHOT
    destination_can_continue = False  # its disk is of another moment: the guest must find it wrong

    def evidence_source(self, *, has_evidence: bool) -> EvidenceSource:
        """The guest, which used its write-once pages while the snapshot was taken."""
        return EvidenceSource.SNAPSHOT

    async def prepare(self, attempt: Attempt) -> None:
        """Keep the RAM of the moment that the snapshot is of."""
        await attempt.copy_source_ram()
        await super().prepare(attempt)

    async def migrate(self, attempt: Attempt) -> None:
        """Take the snapshot while the guest runs on, and load it."""
        await attempt.migration.start()
        async for progress in attempt.follow():
            await self._run_on(attempt, progress)
        await attempt.migration.load()

    async def _run_on(self, attempt: Attempt, progress: Progress) -> None:
        """Let the source's guest run, and its device write."""
        if progress.status != "active":
            return
        qmp = attempt.pair.source.qmp
        if (await qmp.execute("query-status"))["status"] != "running":
            await qmp.execute("cont")  # QEMU 7.2 does so by itself
        await attempt.pair.source_guest.tell(START_WRITE_ONCE)

    def explain_failure(self, error: UntestableError) -> UntestableError:
        """A snapshot that cannot be loaded has rings of a later moment than the devices' state."""
        if CANNOT_LOAD not in str(error):
            return error
        return UnsupportedScenarioError(
            "QEMU took a snapshot that cannot be loaded, as it does not hold off what a "
            "device outside QEMU writes: its rings are of a later moment than the devices' "
            f"state\n{error}"
        )
