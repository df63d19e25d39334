"""Measure the sensitivity of a run: on how many pages a lost dirty bit would have been detected.

A pass needs evidence. Pages that the device wrote only once, after QEMU had sent every page at
least once, are *guaranteed detectable*: only their dirty bit can have made QEMU send them again.
Without a journal dmaproof relies on the guest, which starts to use its write-once pages only then.

A page that the device wrote and that has not reached the log fails the proof even if the page is
equal. QEMU may have sent it for another reason (QEMU dirties every used ring that it stops, and
vCPUs write next to status bytes), but such a reason will not always exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Evidence, Slot
from dmaproof.journal import WriteKind
from dmaproof.trace import TRACED_LINKS, Link
from dmaproof.units import PAGE_BYTES

from ..migration.judgement import EvidenceSource
from ..words import counted
from .attribution import WrittenPages
from .changes import RunningDestination


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of a run. All members except `writes` count pages.

    Attributes:
        writes: writes by the devices.
        written: pages that a device wrote while dirty logging was on.
        rewritten: pages that a device wrote after QEMU had sent every page once.
        guaranteed_detectable: those of the `rewritten` pages that a device wrote only once, with
            data.
        unreported: pages whose last write has not reached the log, whether or not they differ.
        unreported_guaranteed: pages that are both `unreported` and `guaranteed_detectable`.
        reported_unwritten: pages that reached the log although no device had written them.
        missed_at: the `unreported` pages by the first link that did not see them.
        missed_by: the `unreported` pages by the device that wrote them.
        evidence_source: what the figures come from. If it is not the journal, only the write-once
            pages are known. They are `rewritten`, and also `guaranteed_detectable` unless the
            guest's kernel copied them from buffers that it reuses.
    """

    writes: int
    written: int
    rewritten: int
    guaranteed_detectable: int
    unreported: int
    unreported_guaranteed: int
    reported_unwritten: int
    missed_at: dict[str, int] = field(default_factory=dict)
    missed_by: dict[str, int] = field(default_factory=dict)
    evidence_source: EvidenceSource = EvidenceSource.JOURNAL

    @property
    def never_reported(self) -> str:
        """The number of `unreported` pages, as a clause."""
        pages = counted(self.unreported, "page")
        verb = "was" if self.unreported == 1 else "were"
        return f"{pages} that the device wrote {verb} never reported dirty"

    def to_json(self) -> dict[str, Any]:
        """Return the members by name; a figure that is not known is None."""
        members = asdict(self)
        if self.evidence_source == EvidenceSource.JOURNAL:
            return members
        known = ("rewritten", "guaranteed_detectable", "missed_at", "missed_by", "evidence_source")
        return {name: value if name in known else None for name, value in members.items()}


@dataclass(frozen=True)
class _DevicePages:
    """The pages in one device's evidence, as sorted arrays of page numbers.

    `missed` are the pages that have not reached the log since they were written last. `links` has
    for each of them the first link that missed it.
    """

    written: NDArray[np.uint64]
    late: NDArray[np.uint64]
    guaranteed_detectable: NDArray[np.uint64]
    missed: NDArray[np.uint64]
    links: Sequence[Link]
    unwritten: NDArray[np.uint64]


def _pages_of(evidence: Evidence, all_sent_ns: int) -> _DevicePages:
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
    return _DevicePages(
        written=pages,
        late=pages[late],
        guaranteed_detectable=pages[once],
        missed=pages[missed],
        links=[TRACED_LINKS[index] for index in missed_at[missed]],
        unwritten=np.setdiff1d(reported_pages, pages),
    )


def measure_sensitivity(
    evidence: Sequence[Evidence],
    all_sent_ns: int,
    running_destination: RunningDestination | None = None,
) -> Sensitivity:
    """Measure the sensitivity; by `all_sent_ns` (CLOCK_MONOTONIC) every page had been sent once.

    A page is guaranteed detectable if exactly one device wrote it, and only once, and if nothing on
    a `running_destination` may have written it.
    """
    by_device = [_pages_of(each, all_sent_ns) for each in evidence]
    every_write = _together([pages.written for pages in by_device])
    written, writers = np.unique(every_write, return_counts=True)
    guaranteed = np.intersect1d(
        _together([pages.guaranteed_detectable for pages in by_device]), written[writers == 1]
    )
    if running_destination is not None:
        guaranteed = guaranteed[~running_destination.may_have_written(guaranteed)]
    missed = np.unique(_together([pages.missed for pages in by_device]))
    return Sensitivity(
        writes=sum(len(each.records) for each in evidence),
        written=len(written),
        rewritten=len(np.unique(_together([pages.late for pages in by_device]))),
        guaranteed_detectable=len(guaranteed),
        unreported=len(missed),
        unreported_guaranteed=len(np.intersect1d(missed, guaranteed)),
        reported_unwritten=len(np.unique(_together([pages.unwritten for pages in by_device]))),
        missed_at=dict(Counter(link.value for pages in by_device for link in pages.links)),
        missed_by={
            each.device: len(pages.missed)
            for each, pages in zip(evidence, by_device, strict=True)
            if len(pages.missed)
        },
    )


def _together(pages: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, dtype=np.uint64), *pages])


def sensitivity_by_guest(
    write_once: int,
    evidence_source: EvidenceSource = EvidenceSource.GUEST,
    *,
    guaranteed: bool = True,
) -> Sensitivity:
    """Return the sensitivity of a run without a journal, from the guest's report.

    Args:
        write_once: pages that the guest had the device write exactly once. The `evidence_source`
            says when: after every page had been sent, before any was, or during a snapshot.
        evidence_source: what the figures come from.
        guaranteed: whether nothing else was written to these pages.
    """
    return Sensitivity(
        0, 0, write_once, write_once if guaranteed else 0, 0, 0, 0, evidence_source=evidence_source
    )


def _missed_at(
    pages: NDArray[np.uint64], last_writes: NDArray[np.void], evidence: Evidence
) -> NDArray[np.int64]:
    """Return for each page the position in `TRACED_LINKS` of the first link that missed its last
    write, or the number of links if none missed it."""
    first = np.full(len(pages), len(TRACED_LINKS))
    for index, link in reversed(list(enumerate(TRACED_LINKS))):
        first[evidence.links[link].last_many(pages) < last_writes["epoch"]] = index
    return first


def _in_slots(pages: NDArray[np.uint64], slots: Sequence[Slot]) -> NDArray[np.bool_]:
    """Return which of the page numbers are still guest RAM: memory can be unplugged."""
    inside = np.zeros(len(pages), dtype=np.bool_)
    for slot in slots:
        first, end = slot.gpa // PAGE_BYTES, (slot.gpa + slot.length) // PAGE_BYTES
        inside |= (pages >= first) & (pages < end)
    return inside
