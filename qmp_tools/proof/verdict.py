"""The outcome of one proof: what was lost (`attribution`), what would have shown (`sensitivity`).

A ring whose index cannot be right (`rings`) fails the proof by itself, whatever QEMU made of it:
the destination repeats requests, or skips some, or refuses the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..migration.downtime import Downtime
from ..migration.judgement import Blame, EvidenceSource
from ..migration.log_watch import LogEvidence
from .attribution import LostPage
from .rings import Ring
from .sensitivity import Sensitivity


@dataclass(frozen=True)
class GuestOutcome:
    """What the guest itself saw on the destination; `rechecked` counts pages checked again in RAM."""

    requests: int
    errors: int
    rechecked: int
    error_messages: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of one proof.

    With `ended_early` the migration completed before the guest had used its write-once pages, so that no
    number of equal pages is a pass.

    `settled_s` is for how long the source's RAM was seen not to change after its guest had been
    paused, None if it was not looked at; `log` what QEMU's vhost log has shown, if it was watched.

    `refusal` has QEMU's words where the destination refused the devices' state after it had got all
    of RAM. Then, and where there are `wrong_rings`, the guest was not continued.
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

    def count(self, blame: Blame) -> int:
        """How many of the lost pages are `blame`'s."""
        return sum(page.blame == blame for page in self.lost)

    @property
    def can_go_on(self) -> bool:
        """Whether the guest can be continued on the destination, and would not wait in vain."""
        return not (self.refusal or self.wrong_rings)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 lost or too slow, 3 nothing was tested."""
        found = self.lost or self.guest.errors or self.sensitivity.unreported or self._log_faults
        if found or self.wrong_rings or self.downtime.exceeded:
            return EXIT_LOST
        tested = self.sensitivity.rewritten and not (self.ended_early or self.downtime.unmeasured)
        return EXIT_PASS if tested else EXIT_UNTESTED

    @property
    def _log_faults(self) -> list[str]:
        """What the log has shown to be wrong, whether or not a page was lost by it."""
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
                "no page was compared, as the destination refused the device and the source "
                f"continued; {self.sensitivity.unreported} pages that the device wrote have not "
                "reached the dirty log"
            )
        if self.lost:
            return "; ".join((self._loss, *self._log_faults))
        if self._log_faults:
            return "; ".join(("every page equal, but by luck", *self._log_faults))
        if self.guest.errors:
            return (
                f"every page equal, but the guest found {self.guest.errors} errors on the "
                "destination"
            )
        if self.sensitivity.unreported:
            return (
                f"every page equal, but by luck: {self.sensitivity.unreported} pages that the device "
                "wrote have not reached the dirty log"
            )
        if self.downtime.exceeded:
            return f"every page equal, but {self.downtime.sentence}"
        if self.ended_early:
            return (
                "too little was tested: the migration completed before the guest had used its write-once "
                "pages, though it was to be held in precopy until then"
            )
        if not self.sensitivity.rewritten:
            return (
                "nothing was tested: the device dirtied no page again that had already been sent; "
                "give the guest more time or the migration less bandwidth"
            )
        if self.downtime.unmeasured:
            return f"every page equal, but {self.downtime.sentence}"
        return f"every page equal: {self.pages} pages compared"

    @property
    def _loss(self) -> str:
        if self.count(Blame.SNAPSHOT):
            return (
                f"{len(self.lost)} of {self.pages} pages are not of the snapshot's moment: QEMU "
                "took it, and does not hold off what a device outside QEMU writes"
            )
        if self.count(Blame.UNKNOWN) == len(self.lost):
            return (
                f"{len(self.lost)} of {self.pages} pages were lost; by whom is not ours to know, "
                "the device keeps no journal"
            )
        shares = ", ".join(
            f"{self.count(blame)} {_CULPRITS[blame]}" for blame in Blame if self.count(blame)
        )
        return f"{len(self.lost)} of {self.pages} pages were lost: {shares}"

    @property
    def unseen(self) -> list[str]:
        """What may be wrong with a device without a journal, and could not have shown."""
        if self.sensitivity.evidence_source is not EvidenceSource.GUEST:
            return []
        found = []
        if self.settled_s is not None:
            found.append(f"DMA later than {self.settled_s:.1f} s after the guest was paused")
        if self.log is None:
            return found
        found.append(
            "a dirty bit that is set before its data by less than about "
            f"{self.log.look_interval_s * 1000:.1f} ms, or on pages that are used again"
        )
        if not self.log.judged_queues:
            found.append(
                "an unlogged used ring: too few dirty bits came before the device was stopped, or "
                "QEMU does not say where the ring is"
            )
        else:
            found.append(
                "an unlogged used ring whose page the device marks for something else in it"
            )
        found.append(
            "bits that are forgotten when the device is stopped, of pages that it has not written "
            "just before"
        )
        return found


_CULPRITS: Final = {
    Blame.DEVICE: "by the device's dirty tracking",
    Blame.QEMU: "by QEMU's handling of the device's log",
    Blame.ACCELERATOR: "by the accelerator's own dirty tracking",
    Blame.UNKNOWN: "cause unknown",
    Blame.LATE_DMA: "by DMA after the guest had been paused",
    Blame.EARLY_BIT: "by dirty bits that were set before the data was written",
}
