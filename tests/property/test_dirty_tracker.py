"""Trackers against a model of sets of pages: the written pages and the queried pages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dmaproof.dirty_tracker import EmulatedTracker
from dmaproof.dirty_tracker.address_queue import AddressQueue
from dmaproof.dirty_tracker.amd_iommu import AmdIommu
from dmaproof.dirty_tracker.dirty_ring import DirtyRing
from dmaproof.dirty_tracker.intel_iommu import IntelIommu
from dmaproof.dirty_tracker.page_table import PageTableTracker
from dmaproof.dirty_tracker.sequence_pair import SequencePair
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.units import PAGE_BYTES as PAGE

HUGE = 2 << 20
SPACES = (IovaRange(2 * HUGE, 3 * HUGE), IovaRange(1 << 40, 2 * HUGE))

TRACKERS: dict[str, Callable[[], EmulatedTracker]] = {
    "amd": AmdIommu,
    "amd with large pages": lambda: AmdIommu((PAGE, 64 << 10, HUGE)),
    "intel with large pages": lambda: IntelIommu((PAGE, HUGE)),
    "address queue": AddressQueue,
    "sequence pair": SequencePair,
    "dirty ring": lambda: DirtyRing(ring_entries=5),
}

spaces = st.sampled_from(SPACES)


@st.composite
def pieces(draw: st.DrawFn) -> IovaRange:
    space = draw(spaces)
    start = space.iova + draw(st.integers(0, space.length - 1) | st.sampled_from([0, HUGE]))
    room = space.iova + space.length - start
    return IovaRange(
        start, draw(st.sampled_from([1, PAGE, HUGE, room]).filter(lambda n: n <= room))
    )


class TrackerMachine(RuleBasedStateMachine):
    """The model is the set of dirty pages, in the tracker's own page sizes."""

    @initialize(name=st.sampled_from(sorted(TRACKERS)))
    def start(self, name: str) -> None:
        self.tracker = TRACKERS[name]()
        self.tracker.start(SPACES, PAGE)
        self.dirty: set[IovaRange] = set()

    def pages(self, piece: IovaRange) -> set[IovaRange]:
        found, position = set(), piece.iova
        while position < piece.iova + piece.length:
            page = IovaRange(position // PAGE * PAGE, PAGE)
            if isinstance(self.tracker, PageTableTracker):
                mapped = self.tracker.table.page_at(position)
                assert mapped is not None
                page = mapped
            found.add(page)
            position = page.iova + page.length
        return found

    @rule(piece=pieces())
    def write(self, piece: IovaRange) -> None:
        self.tracker.dma(*piece)
        self.dirty |= self.pages(piece)

    @rule(piece=pieces())
    def resize(self, piece: IovaRange) -> None:
        """Split or merge the huge pages of a page table while it tracks."""
        if not isinstance(self.tracker, PageTableTracker):
            return
        iova = piece.iova // HUGE * HUGE
        size = HUGE if piece.length > PAGE else PAGE
        before = {page for page in self.dirty if iova <= page.iova < iova + HUGE}
        self.dirty -= before
        self.tracker.table.resize(iova, HUGE, size)
        for page in before:
            self.dirty |= self.pages(page)

    @rule(piece=pieces())
    def read(self, piece: IovaRange) -> None:
        iova, length = piece
        with IovaBitmap(iova, length, 1 << 9, np.zeros(length // 512 // 64 + 2, np.uint64)) as bits:
            bits.for_each(self.tracker.read_and_clear)
            found = set()
            for start, size in bits.ranges():
                found |= set(range(start // 512, (start + size - 1) // 512 + 1))
        expected: set[int] = set()
        for page in set(self.dirty):
            low, high = max(page.iova, iova), min(page.iova + page.length, iova + length)
            if low < high:
                expected |= set(range(low // 512, (high - 1) // 512 + 1))
            if iova <= page.iova and page.iova + page.length <= iova + length:
                self.dirty.remove(page)
        assert found == expected


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(
    max_examples=100,
    stateful_step_count=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
