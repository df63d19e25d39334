"""A background snapshot, which QEMU saves while the guest continues on the source.

QEMU write-protects the guest's memory and saves a page before it lets a vCPU change the page. QEMU
does not protect the memory against writes of a device outside QEMU.
"""

from __future__ import annotations

import shlex
import sys
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ...devices.device import ProofDevice
from ...guest.channel import START_WRITE_ONCE
from ..attempt import Attempt
from ..judgement import Blame, EvidenceSource
from ..migration import Progress
from ..procedure import UnsupportedScenarioError
from ..state_refusal import CANNOT_LOAD
from ..transport import cat_from, saved_transport
from .base import Scenario

# QEMU saves a background snapshot without a bandwidth limit. This reads some 12 MiB a second.
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
    """The guest as it was when the snapshot began, restored on the destination."""

    name = "background-snapshot"
    summary = "QEMU saves a snapshot while the guest continues; devices bypass QEMU's protection"
    transport = _EXEC_SLOWLY
    capabilities = ("background-snapshot",)

    is_held_in_precopy = False
    is_repeatable = False
    downtime_is_measurable = False
    stops_rings = False
    has_journal = False
    blame_without_journal = Blame.SNAPSHOT
    destination_can_continue = False  # the disk has changed since: the guest would find errors

    def require_device(self, device: ProofDevice) -> None:
        """Refuse to kill a device: QEMU does not log, and the destination's serves nothing.

        Raises:
            UsageError: a device is to be killed.
        """
        super().require_device(device)
        if device.facts.destination_killed:
            raise UsageError(
                f"--kill-destination-device: --scenario {self.name} does not continue the guest on "
                "the destination; choose another scenario"
            )

    def evidence_source(self, *, has_evidence: bool) -> EvidenceSource:
        """Return the guest, which used its write-once pages while QEMU took the snapshot."""
        return EvidenceSource.SNAPSHOT

    async def prepare(self, attempt: Attempt) -> None:
        """Copy the RAM at the moment of the snapshot."""
        await attempt.copy_source_ram()
        await super().prepare(attempt)

    async def migrate(self, attempt: Attempt) -> None:
        """Take the snapshot while the guest continues, and load it."""
        await attempt.migration.start()
        async for progress in attempt.follow():
            await self._continue_guest(attempt, progress)
        await attempt.migration.load()

    async def _continue_guest(self, attempt: Attempt, progress: Progress) -> None:
        """Let the source's guest run and use its write-once pages."""
        if progress.status != "active":
            return
        qmp = attempt.pair.source.qmp
        if (await qmp.execute("query-status"))["status"] != "running":
            await qmp.execute("cont")  # QEMU 7.2 does so by itself
        await attempt.pair.source_guest.send(START_WRITE_ONCE)

    def explain_failure(self, error: UntestableError) -> UntestableError:
        """Explain that rings newer than the devices' state make a snapshot unloadable."""
        if CANNOT_LOAD not in str(error):
            return error
        return UnsupportedScenarioError(
            "QEMU took a snapshot that it cannot load: QEMU does not protect the memory against "
            "writes of a device outside QEMU, so the rings are newer than the devices' state\n"
            f"{error}"
        )
