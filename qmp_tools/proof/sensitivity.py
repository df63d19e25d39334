"""How much a run can tell: on which pages a lost dirty bit would have shown.

A pass needs evidence. Pages that the device wrote only once, after QEMU had sent every page at
least once, are *certain*: their bit is the only thing that can have brought them across. Where
there is no journal the guest's word counts: it began to read into its once pages only then.

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
    witness: EvidenceSource = EvidenceSource.JOURNAL

    def to_json(self) -> dict[str, Any]:
        """The members by name; what is not known is None."""
        members = asdict(self)
        if self.witness == EvidenceSource.JOURNAL:
            return members
        known = ("rewritten", "certain", "missed_at", "missed_by", "witness")
        return {name: value if name in known else None for name, value in members.items()}


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
    once: int, witness: EvidenceSource = EvidenceSource.GUEST, *, certain: bool = True
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
