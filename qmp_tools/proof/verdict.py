"""Holds every page of the destination against the source, and says who lost it.

For a page that differs, the bytes that differ are held against the device's journal:

- The device wrote none of them while logging was on: the loss is the **accelerator's**, QEMU's own
  tracking of what its vCPUs write.
- The device wrote some of them: the last such write was due in a certain harvest, and the first
  link of the chain (`dmaproof.trace.Link`) that has not seen the page in that harvest or later lost
  it: the loss is the **device's**.
- Every link of ours has seen it, and the source still holds what the device wrote: the bit was in
  QEMU's log in time and QEMU did not send the page: **qemu**'s. If the source holds something else,
  a vCPU wrote there later, and the loss is again the accelerator's.

A page that the device wrote and that has not reached the log fails the proof even where it is
equal: QEMU may have sent it for a reason of its own (it dirties every used ring when it stops it,
and vCPUs write beside status bytes), and will not always have one.

Of a device that keeps no journal none of this is known: who lost a page stays open. Only a page
that was written after the guest had been paused (`late_dma`), and a page whose dirty bit was in
QEMU's log before its data was in RAM (`migration.log_watch`), are the device's for certain.

A ring whose index cannot be right (`rings`) fails the proof by itself, whatever QEMU made of it:
the destination repeats requests, or skips some, or refuses the device.

A pass needs evidence. Pages that the device wrote only once, after QEMU had sent every page at
least once, are *certain*: their bit is the only thing that can have brought them across. Where
there is no journal the guest's word counts: it began to read into its once pages only then.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Evidence, Slot
from dmaproof.journal import WriteKind
from dmaproof.trace import TRACED_LINKS, Link

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from ..memory.ram import PAGE_BYTES, RamFile
from ..migration.downtime import Downtime
from ..migration.log_watch import LogEvidence
from .rings import Ring


class Blame(StrEnum):
    """Whose loss it was."""

    DEVICE = "device"
    QEMU = "qemu"
    ACCELERATOR = "accelerator"
    SNAPSHOT = "snapshot"
    UNKNOWN = "unknown"
    LATE_DMA = "late-dma"
    EARLY_BIT = "early-bit"


@dataclass(frozen=True)
class LostPage:
    """One page that differs. Addresses in bytes; `gpa` is None where no memory slot names it.

    `bytes_differing` is None where the page was written only after it had been compared.

    The members from `iova` on tell of the device's last write to the bytes that differ, and are
    None where there was none; `device` is its name, `seconds` count from the start of logging.
    """

    ram_offset: int
    gpa: int | None
    bytes_differing: int | None
    blame: Blame
    link: Link | None = None
    device: str | None = None
    iova: int | None = None
    request: int | None = None
    queue: int | None = None
    kind: str | None = None
    seconds: float | None = None
    due_in_harvest: int | None = None
    last_seen_in_harvest: dict[str, int] = field(default_factory=dict)


class Witness(StrEnum):
    """Who knows what a device wrote: its own journal, or only the guest that asked for it.

    STILL is the guest too, where it stood still before anything moved; SNAPSHOT where it ran on
    while a snapshot was taken.
    """

    JOURNAL = "journal"
    GUEST = "guest"
    STILL = "still"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True)
class Sharpness:
    """How much a run can tell; all in pages but for `writes`.

    `rewritten` were written by the device after QEMU had sent every page once; `certain` are those
    of them that the device wrote only once, with data. `unreported` were written and have not
    reached the log since, whether they were lost by it or saved by luck; `unreported_certain` are
    both; `missed_at` counts them by the first link that has not seen them, `missed_by` by the
    device that wrote them. `reported_unwritten` reached the log though no device had written them.
    Where the `witness` is not the journal, the once pages alone are known: they are `rewritten`,
    and `certain` unless the guest's kernel has copied them from buffers that it uses again.
    """

    writes: int
    written: int
    rewritten: int
    certain: int
    unreported: int
    unreported_certain: int
    reported_unwritten: int
    missed_at: dict[str, int] = field(default_factory=dict)
    missed_by: dict[str, int] = field(default_factory=dict)
    witness: Witness = Witness.JOURNAL

    def to_json(self) -> dict[str, Any]:
        """The members by name; what is not known is None."""
        members = asdict(self)
        if self.witness == Witness.JOURNAL:
            return members
        known = ("rewritten", "certain", "missed_at", "missed_by", "witness")
        return {name: value if name in known else None for name, value in members.items()}


@dataclass(frozen=True)
class GuestOutcome:
    """What the guest itself saw on the destination; `swept` counts pages checked again in RAM."""

    requests: int
    errors: int
    swept: int
    complaints: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of one proof.

    With `ended_early` the migration completed before the guest had used its once pages, so that no
    number of equal pages is a pass.

    `settled_s` is for how long the source's RAM was seen not to change after its guest had been
    paused, None if it was not looked at; `log` what QEMU's vhost log has shown, if it was watched.

    `refusal` has QEMU's words where the destination refused the devices' state after it had got all
    of RAM. Then, and where there are `wrong_rings`, the guest was not continued.
    """

    pages: int
    lost: Sequence[LostPage]
    sharpness: Sharpness
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
        found = self.lost or self.guest.errors or self.sharpness.unreported or self._log_faults
        if found or self.wrong_rings or self.downtime.exceeded:
            return EXIT_LOST
        tested = self.sharpness.rewritten and not (self.ended_early or self.downtime.unmeasured)
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
                f"continued; {self.sharpness.unreported} pages that the device wrote have not "
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
        if self.sharpness.unreported:
            return (
                f"every page equal, but by luck: {self.sharpness.unreported} pages that the device "
                "wrote have not reached the dirty log"
            )
        if self.downtime.exceeded:
            return f"every page equal, but {self.downtime.sentence}"
        if self.ended_early:
            return (
                "too little was tested: the migration completed before the guest had used its once "
                "pages, though it was to be held in precopy until then"
            )
        if not self.sharpness.rewritten:
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
        if self.sharpness.witness is not Witness.GUEST:
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


class WrittenPages:
    """The journal's records by the page that they touch.

    `pages` (GPA page numbers, sorted) and `rows` (indices into the records) have one entry for each
    page of each record; for one page the rows are in the order of the writes.
    """

    def __init__(self, records: NDArray[np.void]) -> None:
        page_bytes = np.uint64(PAGE_BYTES)
        first = records["gpa"] // page_bytes
        last = (records["gpa"] + np.maximum(records["length"], 1) - np.uint64(1)) // page_bytes
        counts = (last - first + np.uint64(1)).astype(np.int64)
        rows = np.repeat(np.arange(len(records)), counts)
        position = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        pages = first[rows] + position.astype(np.uint64)
        order = np.argsort(pages, kind="stable")
        self.pages: NDArray[np.uint64] = pages[order]
        self.rows: NDArray[np.int64] = rows[order]

    def rows_of(self, page: int) -> NDArray[np.int64]:
        """The records that touch page number `page`, in the order of the writes."""
        low, high = np.searchsorted(
            self.pages, np.array((page, page + 1), dtype=np.uint64), side="left"
        )
        return self.rows[low:high]


@dataclass(frozen=True)
class _Told:
    """What one device's evidence tells, in sorted arrays of page numbers.

    `missed` are the pages that have not reached the log since they were written last, `links` for
    each of them the first link that missed it.
    """

    written: NDArray[np.uint64]
    late: NDArray[np.uint64]
    certain: NDArray[np.uint64]
    missed: NDArray[np.uint64]
    links: Sequence[Link]
    unwritten: NDArray[np.uint64]


def _told_by(evidence: Evidence, all_sent_ns: int) -> _Told:
    records = evidence.records
    written = WrittenPages(records)
    pages, first, counts = np.unique(written.pages, return_index=True, return_counts=True)
    last_rows = written.rows[first + counts - 1]
    late = records["time_ns"][last_rows] >= all_sent_ns
    once = late & (counts == 1) & (records["kind"][last_rows] == WriteKind.DATA)
    missed_at = _missed_at(pages, records[last_rows], evidence)
    missed = (missed_at < len(TRACED_LINKS)) & _in_slots(pages, evidence.slots)
    logged = evidence.links[Link.LOG]
    reported = [
        np.flatnonzero(logged.array[offset : offset + length // PAGE_BYTES]) + start // PAGE_BYTES
        for offset, (start, length) in zip(
            np.cumsum([0, *(length // PAGE_BYTES for _, length in logged.ranges)]),
            logged.ranges,
            strict=False,
        )
    ]
    reported_pages = np.concatenate([np.empty(0, dtype=np.int64), *reported]).astype(np.uint64)
    return _Told(
        written=pages,
        late=pages[late],
        certain=pages[once],
        missed=pages[missed],
        links=[TRACED_LINKS[index] for index in missed_at[missed]],
        unwritten=np.setdiff1d(reported_pages, pages),
    )


def measure_sharpness(evidence: Sequence[Evidence], all_sent_ns: int) -> Sharpness:
    """What the run can tell; by `all_sent_ns` (CLOCK_MONOTONIC) every page had been sent once.

    A page is certain if it was written once by one of the devices and never by another.
    """
    told = [_told_by(each, all_sent_ns) for each in evidence]
    every_write = _together([each.written for each in told])
    pages, writers = np.unique(every_write, return_counts=True)
    certain = np.intersect1d(_together([each.certain for each in told]), pages[writers == 1])
    missed = np.unique(_together([each.missed for each in told]))
    return Sharpness(
        writes=sum(len(each.records) for each in evidence),
        written=len(pages),
        rewritten=len(np.unique(_together([each.late for each in told]))),
        certain=len(certain),
        unreported=len(missed),
        unreported_certain=len(np.intersect1d(missed, certain)),
        reported_unwritten=len(np.unique(_together([each.unwritten for each in told]))),
        missed_at=dict(Counter(link.value for each in told for link in each.links)),
        missed_by={
            each.device: len(its.missed)
            for each, its in zip(evidence, told, strict=True)
            if len(its.missed)
        },
    )


def _together(pages: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, dtype=np.uint64), *pages])


def sharpness_by_guest(
    once: int, witness: Witness = Witness.GUEST, *, certain: bool = True
) -> Sharpness:
    """What a run without a journal can tell: `once` pages the guest has had read into just once,
    all of them after everything had been sent, before anything was, or while it was; if they are
    `certain`, each at a place that nothing else was written to."""
    return Sharpness(0, 0, once, once if certain else 0, 0, 0, 0, witness=witness)


def _missed_at(
    pages: NDArray[np.uint64], last_writes: NDArray[np.void], evidence: Evidence
) -> NDArray[np.int64]:
    """For each page, the position in `TRACED_LINKS` of the first link that has missed its last
    write; their number where none has."""
    first = np.full(len(pages), len(TRACED_LINKS))
    for index, link in reversed(list(enumerate(TRACED_LINKS))):
        first[evidence.links[link].last_many(pages) < last_writes["epoch"]] = index
    return first


def _in_slots(pages: NDArray[np.uint64], slots: Sequence[Slot]) -> NDArray[np.bool_]:
    """Which of the page numbers are still guest RAM: memory can be unplugged."""
    inside = np.zeros(len(pages), dtype=np.bool_)
    for slot in slots:
        first, end = slot.gpa // PAGE_BYTES, (slot.gpa + slot.length) // PAGE_BYTES
        inside |= (pages >= first) & (pages < end)
    return inside


def attribute(
    differing: NDArray[np.int64],
    source: RamFile,
    destination: RamFile,
    slots: Sequence[Slot],
    evidence: Sequence[Evidence],
    blame: Blame = Blame.UNKNOWN,
) -> list[LostPage]:
    """Who lost each of the `differing` pages (page numbers of the RAM files).

    `slots` say where the guest has its RAM; without any `evidence` it was `blame`.
    """
    slots = slots_in(source, slots)
    if not evidence:
        return [_unattributed(int(page), slots, source, destination, blame) for page in differing]
    written = [WrittenPages(each.records) for each in evidence]
    return [
        _attribute_page(int(page), slots, source, destination, evidence, written)
        for page in differing
    ]


def blame_early_bits(lost: Sequence[LostPage], log: LogEvidence) -> list[LostPage]:
    """The `lost` pages, with that blame where the `log` has shown the page's bit to be early."""
    early = set(log.early_bits)
    return [replace(page, blame=Blame.EARLY_BIT) if page.gpa in early else page for page in lost]


def with_late_dma(lost: Sequence[LostPage], late: Sequence[LostPage]) -> list[LostPage]:
    """The `lost` pages and the `late` ones, each once: by the journal where there is one."""

    def place(page: LostPage) -> tuple[int, int | None]:
        return page.ram_offset, page.gpa

    late_places = {place(page) for page in late}
    others = [
        page for page in lost if page.blame is not Blame.UNKNOWN or place(page) not in late_places
    ]
    other_places = {place(page) for page in others}
    return [*others, *(page for page in late if place(page) not in other_places)]


def slots_in(ram: RamFile, slots: Sequence[Slot]) -> list[Slot]:
    """Those of the `slots` that are parts of `ram`."""
    return [slot for slot in slots if (slot.device, slot.inode) == (ram.device, ram.inode)]


def _attribute_page(
    index: int,
    slots: Sequence[Slot],
    source: RamFile,
    destination: RamFile,
    journals: Sequence[Evidence],
    written: Sequence[WrittenPages],
) -> LostPage:
    ram_offset = index * PAGE_BYTES
    differs = _differs(ram_offset, source, destination)
    bytes_differing = int(differs.sum())
    gpa = gpa_of(ram_offset, slots)
    if gpa is None:
        return LostPage(ram_offset, None, bytes_differing, Blame.ACCELERATOR)
    page = gpa // PAGE_BYTES
    lost = LostPage(ram_offset, gpa, bytes_differing, Blame.ACCELERATOR)
    last = [
        (record["time_ns"], record, evidence)
        for evidence, rows in zip(journals, written, strict=True)
        if (record := _last_write_of(differs, gpa, evidence.records, rows.rows_of(page)))
        is not None
    ]
    if not last:
        return lost
    _, record, evidence = max(last, key=lambda it: it[0])
    iova = int(record["iova"]) + max(0, gpa - int(record["gpa"]))
    due = int(record["epoch"])
    seen = {link: evidence.links[link].last(gpa) for link in TRACED_LINKS}
    link = next((link for link in TRACED_LINKS if seen[link] < due), Link.QEMU)
    blame = Blame.DEVICE
    if link == Link.QEMU:
        blame = Blame.QEMU if _still_there(record, source, slots) else Blame.ACCELERATOR
    return LostPage(
        ram_offset=ram_offset,
        gpa=gpa,
        bytes_differing=bytes_differing,
        blame=blame,
        link=link if blame != Blame.ACCELERATOR else None,
        device=evidence.device or None,
        iova=iova,
        request=int(record["request"]),
        queue=int(record["queue"]),
        kind=WriteKind(int(record["kind"])).name.lower().replace("_", " "),
        seconds=(int(record["time_ns"]) - (evidence.started_ns or 0)) / 1e9,
        due_in_harvest=due,
        last_seen_in_harvest={link.value: epoch for link, epoch in seen.items()},
    )


def _unattributed(
    index: int, slots: Sequence[Slot], source: RamFile, destination: RamFile, blame: Blame
) -> LostPage:
    ram_offset = index * PAGE_BYTES
    bytes_differing = int(_differs(ram_offset, source, destination).sum())
    return LostPage(ram_offset, gpa_of(ram_offset, slots), bytes_differing, blame)


def _differs(ram_offset: int, source: RamFile, destination: RamFile) -> NDArray[np.bool_]:
    ours, theirs = (
        np.frombuffer(ram.read(ram_offset, PAGE_BYTES), dtype=np.uint8)
        for ram in (source, destination)
    )
    differs: NDArray[np.bool_] = ours != theirs
    return differs


def gpa_of(ram_offset: int, slots: Sequence[Slot]) -> int | None:
    """Where the guest has what is at `ram_offset` of a RAM file; None where it has it nowhere."""
    for slot in slots:
        if slot.file_offset <= ram_offset < slot.file_offset + slot.length:
            return slot.gpa + ram_offset - slot.file_offset
    return None


def _offset_of(gpa: int, slots: Sequence[Slot]) -> int | None:
    for slot in slots:
        if slot.gpa <= gpa < slot.gpa + slot.length:
            return slot.file_offset + gpa - slot.gpa
    return None


def _last_write_of(
    differs: NDArray[np.bool_], gpa: int, records: NDArray[np.void], rows: NDArray[np.int64]
) -> np.void | None:
    """The last of the writes `rows` to one of the bytes of the page at `gpa` that differ."""
    for row in rows[::-1]:
        start = int(records["gpa"][row]) - gpa
        end = start + int(records["length"][row])
        if differs[max(0, start) : max(0, end)].any():
            record: np.void = records[row]
            return record
    return None


def _still_there(record: np.void, source: RamFile, slots: Sequence[Slot]) -> bool:
    """Whether the source's RAM holds just what the device wrote."""
    offset = _offset_of(int(record["gpa"]), slots)
    if offset is None:
        return False
    content = source.read(offset, int(record["length"]))
    return zlib.crc32(content) == int(record["checksum"])
