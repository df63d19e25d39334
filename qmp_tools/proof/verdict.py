"""The outcome of one proof: the lost pages (`attribution`) and the `sensitivity` of the run.

A ring whose index cannot be right (`rings`) fails the proof by itself, regardless of what QEMU did
with the index: the destination may repeat requests, skip some, or refuse the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ..devices.vhost_recorder import KernelLogs
from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..migration.downtime import Downtime
from ..migration.judgement import Blame, EvidenceSource
from ..migration.log_watch import LogEvidence
from ..words import counted
from .attribution import LostPage
from .changes import Changes
from .rings import Ring
from .sensitivity import Sensitivity


@dataclass(frozen=True)
class GuestOutcome:
    """The guest's own findings on the destination; `rechecked` counts the rechecked pages.

    `awaiting_restart` counts the requests that were unanswered while the destination's device was
    dead; None if that device was not killed.
    """

    requests: int
    errors: int
    rechecked: int
    error_messages: Sequence[str] = ()
    awaiting_restart: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of one proof.

    `given_back` counts the pages that were not compared because the guest has given them back, or,
    if QEMU `skips_free_pages`, because they differ and may be free.

    With `ended_early` the migration completed before the guest had used its write-once pages, so
    that equal pages are not a pass.

    `settled_s` is for how long the source's RAM was watched after its guest had been paused; None
    if it was not watched. `log` holds the findings in QEMU's vhost log, if the log was watched.

    `refusal` holds QEMU's error messages if the destination refused the devices' state after it had
    received all of RAM. In this case, and if there are `wrong_rings`, the guest was not continued.

    `untested` is a reason why equal pages are not a pass. `changes` are the pages that changed on a
    destination that ran before the comparison. `kernel_logs` is what the kernel has logged, if
    there is a recorder.
    """

    pages: int
    lost: Sequence[LostPage]
    sensitivity: Sensitivity
    guest: GuestOutcome
    ended_early: bool = False
    settled_s: float | None = None
    log: LogEvidence | None = None
    downtime: Downtime = field(default_factory=Downtime)
    wrong_rings: Sequence[Ring] = ()
    refusal: str | None = None
    untested: str | None = None
    changes: Changes | None = None
    given_back: int = 0
    skips_free_pages: bool = False
    kernel_logs: KernelLogs | None = None

    def count(self, blame: Blame) -> int:
        """Return how many of the lost pages are attributed to `blame`."""
        return sum(page.blame == blame for page in self.lost)

    @property
    def can_continue(self) -> bool:
        """Whether the guest can be continued on the destination without waiting forever."""
        return not (self.refusal or self.wrong_rings)

    @property
    def exit_code(self) -> int:
        """The exit code: 0 for a pass, 1 for a loss or a long downtime, 3 if nothing was tested."""
        found = self.lost or self.guest.errors or self.sensitivity.unreported or self._log_faults
        if found or self.wrong_rings or self.downtime.exceeded:
            return EXIT_LOST
        tested = self.sensitivity.rewritten and not (
            self.ended_early or self.untested or self.downtime.unmeasured
        )
        return EXIT_PASS if tested else EXIT_UNTESTED

    @property
    def _log_faults(self) -> list[str]:
        """The faults that the log has shown, whether or not they lost a page."""
        found = []
        if self.log and self.log.late_bits:
            found.append(
                f"{len(self.log.late_bits)} dirty bits were set after QEMU had read the log for "
                "the last time"
            )
        if self.log and self.log.unlogged_queues:
            queues = ", ".join(str(queue) for queue in self.log.unlogged_queues)
            found.append(f"the device never logged its writes to the used ring of queue {queues}")
        return found

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        if self.wrong_rings:
            number = len(self.wrong_rings)
            wrong = "index of a ring is" if number == 1 else f"indices of {number} rings are"
            return f"the {wrong} wrong: {self.wrong_rings[0].story}"
        if self.refusal and not self.pages:
            return (
                "no page was compared, because the destination refused the device; "
                f"{self.sensitivity.never_reported}"
            )
        if self.lost:
            return "; ".join((self._loss, *self._log_faults))
        if self._log_faults:
            return f"all pages are equal, but {'; '.join(self._log_faults)}"
        if self.guest.errors:
            restarted = ", whose device was killed and restarted"
            return (
                f"all pages are equal, but the guest found {counted(self.guest.errors, 'error')} "
                f"on the destination{'' if self.guest.awaiting_restart is None else restarted}"
            )
        if self.sensitivity.unreported:
            return (
                f"all pages are equal, but {self.sensitivity.never_reported}: QEMU "
                "sent the new content for another reason"
            )
        if self.downtime.exceeded:
            return f"all pages are equal, but {self.downtime.sentence}"
        if self.ended_early:
            return (
                "too little was tested: the migration completed before the guest had used all its "
                "write-once pages, although dmaproof tried to hold it in precopy until then"
            )
        if self.untested:
            return f"too little was tested: {self.untested}"
        if not self.sensitivity.rewritten:
            return (
                "nothing was tested: the device wrote no page after QEMU had already sent it; "
                "give the guest more time or the migration less bandwidth"
            )
        if self.downtime.unmeasured:
            return f"all pages are equal, but {self.downtime.sentence}"
        if self.changes:
            return (
                "all pages are equal except for what was written on the destination: "
                f"{self.pages - self.changes.not_compared} pages compared"
            )
        compared = f"all pages are equal: {self.pages} pages compared"
        if self.given_back and self.skips_free_pages:
            return (
                f"{compared}; {self.given_back} others differ, but the guest's program uses none "
                "of them, and QEMU may skip pages that the guest says are free"
            )
        if self.given_back:
            return (
                f"{compared}; {self.given_back} others were not, because the guest gave them back "
                "and their content no longer matters"
            )
        return compared

    @property
    def _loss(self) -> str:
        if self.count(Blame.SNAPSHOT):
            return (
                f"{len(self.lost)} of {self.pages} pages have a newer content than at the start of "
                "the snapshot: QEMU does not hold back the writes of a device outside QEMU while "
                "it takes a snapshot"
            )
        lost = f"{len(self.lost)} of {self.pages} pages were lost"
        if self.count(Blame.UNKNOWN) == len(self.lost):
            return f"{lost}, cause unknown: the device keeps no journal"
        shares = ", ".join(
            f"{self.count(blame)} {_CULPRITS[blame]}" for blame in Blame if self.count(blame)
        )
        return f"{lost}: {shares}"

    @property
    def unseen(self) -> list[str]:
        """The faults that this proof could not have detected, although others like it can."""
        if self.changes:
            return [
                f"a loss of any of the {self.changes.not_compared} pages that the guest may write "
                f"itself; {self.changes.by_guest} of them differ"
            ]
        if self.sensitivity.evidence_source is not EvidenceSource.GUEST:
            return []
        found = []
        if self.settled_s is not None:
            found.append(f"DMA later than {self.settled_s:.1f} s after the guest was paused")
        if self.log is None:
            return found
        found.append(
            "a dirty bit that the device sets less than about "
            f"{self.log.look_interval_s * 1000:.1f} ms before it writes the data, or any time "
            "before on a page that is reused"
        )
        if not self.log.judged_queues:
            found.append(
                "a used ring that the device does not log: it set too few dirty bits before it was "
                "stopped, or QEMU does not report where the ring is"
            )
        else:
            found.append(
                "a used ring that the device does not log, if the device logs something else on "
                "the same page"
            )
        found.append(
            "dirty bits that the device drops when it is stopped, except those of pages that it "
            "wrote just before"
        )
        return found


_CULPRITS: Final = {
    Blame.DEVICE: "by the device's dirty tracking",
    Blame.QEMU: "by QEMU, although the device reported them dirty in time",
    Blame.ACCELERATOR: "by the accelerator's own dirty tracking",
    Blame.UNKNOWN: "cause unknown",
    Blame.LATE_DMA: "by DMA after the guest had been paused",
    Blame.EARLY_BIT: "by dirty bits that were set before the data was written",
}
