"""How much a run can tell: on which pages a lost dirty bit would have shown.

A pass needs evidence. Pages that the device wrote only once, after QEMU had sent every page at
least once, are *guaranteed detectable*: their bit is the only thing that can have brought them across. Where
there is no journal the guest's word counts: it began to read into its write-once pages only then.

A page that the device wrote and that has not reached the log fails the proof even where it is
equal: QEMU may have sent it for a reason of its own (it dirties every used ring when it stops it,
and vCPUs write beside status bytes), and will not always have one.
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
from .attribution import WrittenPages


@dataclass(frozen=True)
class Sensitivity:
    """How much a run can tell; all in pages but for `writes`.

    `rewritten` were written by the device after QEMU had sent every page once;
    `guaranteed_detectable` are those of them that the device wrote only once, with data.
    `unreported` were written and have not reached the log since, whether they were lost by it or
    saved by luck; `unreported_guaranteed` are both; `missed_at` counts them by the first link that has not seen them, `missed_by` by the
    device that wrote them. `reported_unwritten` reached the log though no device had written them.
    Where the `evidence_source` is not the journal, the write-once pages alone are known: they are
    `rewritten`, and `guaranteed_detectable` unless the guest's kernel has copied them from buffers that it uses again.
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

    def to_json(self) -> dict[str, Any]:
        """The members by name; what is not known is None."""
        members = asdict(self)
        if self.evidence_source == EvidenceSource.JOURNAL:
            return members
        known = ("rewritten", "guaranteed_detectable", "missed_at", "missed_by", "evidence_source")
        return {name: value if name in known else None for name, value in members.items()}


@dataclass(frozen=True)
class _Told:
    """What one device's evidence tells, in sorted arrays of page numbers.

    `missed` are the pages that have not reached the log since they were written last, `links` for
    each of them the first link that missed it.
    """

    written: NDArray[np.uint64]
    late: NDArray[np.uint64]
    guaranteed_detectable: NDArray[np.uint64]
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
        guaranteed_detectable=pages[once],
        missed=pages[missed],
        links=[TRACED_LINKS[index] for index in missed_at[missed]],
        unwritten=np.setdiff1d(reported_pages, pages),
    )


def measure_sensitivity(evidence: Sequence[Evidence], all_sent_ns: int) -> Sensitivity:
    """What the run can tell; by `all_sent_ns` (CLOCK_MONOTONIC) every page had been sent once.

    A page is guaranteed detectable if it was written once by one of the devices and never by another.
    """
    told = [_told_by(each, all_sent_ns) for each in evidence]
    every_write = _together([each.written for each in told])
    pages, writers = np.unique(every_write, return_counts=True)
    guaranteed = np.intersect1d(
        _together([each.guaranteed_detectable for each in told]), pages[writers == 1]
    )
    missed = np.unique(_together([each.missed for each in told]))
    return Sensitivity(
        writes=sum(len(each.records) for each in evidence),
        written=len(pages),
        rewritten=len(np.unique(_together([each.late for each in told]))),
        guaranteed_detectable=len(guaranteed),
        unreported=len(missed),
        unreported_guaranteed=len(np.intersect1d(missed, guaranteed)),
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


def sensitivity_by_guest(
    write_once: int,
    evidence_source: EvidenceSource = EvidenceSource.GUEST,
    *,
    guaranteed: bool = True,
) -> Sensitivity:
    """What a run without a journal can tell: `write_once` pages the guest has had read into just once,
    all of them after everything had been sent, before anything was, or while it was; if they are
    `guaranteed`, each at a place that nothing else was written to."""
    return Sensitivity(
        0, 0, write_once, write_once if guaranteed else 0, 0, 0, 0, evidence_source=evidence_source
    )


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
