"""The comparison of both guests' RAM: hold pages, and the decisions of the scenario."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof.errors import UntestableError
from dmaproof.evidence import Slot
from qmp_tools.memory.ram import RamFile
from qmp_tools.migration.judgement import Blame
from qmp_tools.migration.scenarios.base import Scenario
from qmp_tools.migration.scenarios.cpr import CprTransfer
from qmp_tools.migration.scenarios.precopy import Unix
from qmp_tools.proof import comparison
from qmp_tools.proof.comparison import Comparison, compare_guests
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 16
GPA = 1 << 32
HOLD_PAGE = 3
OTHER_PAGE = 5


@dataclass
class Guests:
    """A source and a destination whose RAM differs where a test wrote to it."""

    source: RamFile
    destination: RamFile

    def write(self, page: int) -> None:
        """Write to a page of the source alone."""
        os.pwrite(self.source.fd, b"late", page * PAGE)

    def compared(self, scenario: Scenario, *, ended_early: bool = False) -> Comparison:
        """Compare, for a device that keeps no journal, without rings."""

        async def evidence(side: str) -> list[object]:
            return []

        @contextlib.asynccontextmanager
        async def ram(file: RamFile) -> AsyncIterator[Sequence[RamFile]]:
            yield [file]

        pair = SimpleNamespace(
            source="source",
            destination="destination",
            source_side="source",
            device=SimpleNamespace(evidence=evidence, kernel_logs=lambda side: None),
            hold_pages=range(GPA + HOLD_PAGE * PAGE, GPA + OTHER_PAGE * PAGE, PAGE),
        )
        attempt = SimpleNamespace(
            source_ram=lambda: ram(self.source),
            destination_ram=lambda: ram(self.destination),
            log_watch=None,
        )
        migrated = SimpleNamespace(
            refusal=None,
            source_continued=False,
            ram_is_comparable=True,
            ended_early=ended_early,
            all_sent_ns=0,
        )
        work = compare_guests(
            cast(Any, pair),
            scenario,
            cast(Any, attempt),
            cast(Any, migrated),
            reports_rings=False,
        )
        return asyncio.run(work)


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guests]:
    async def slots_of(qemu: object, ram: RamFile) -> list[Slot]:
        return [Slot(GPA, ram.length, 0, ram.device, ram.inode)]

    monkeypatch.setattr(comparison, "slots_of", slots_of)
    with ram_fd(PAGES * PAGE) as source, ram_fd(PAGES * PAGE) as destination:
        yield Guests(*(_opened(fd) for fd in (source, destination)))


def _opened(fd: int) -> RamFile:
    status = os.fstat(fd)
    return RamFile(fd, status.st_size, status.st_dev, status.st_ino)


def lost_pages(found: Comparison) -> list[int]:
    return [page.ram_offset // PAGE for page in found.lost]


def test_hold_pages_that_qemu_wrote_after_an_early_end_are_not_lost(
    guests: Guests,
) -> None:
    for page in (HOLD_PAGE, HOLD_PAGE + 1, OTHER_PAGE):
        guests.write(page)
    found = guests.compared(Unix(), ended_early=True)
    assert lost_pages(found) == [OTHER_PAGE]
    assert found.pages == PAGES


def test_a_hold_page_that_differs_after_a_normal_end_is_lost(guests: Guests) -> None:
    guests.write(HOLD_PAGE)
    assert lost_pages(guests.compared(Unix())) == [HOLD_PAGE]


def test_a_scenario_can_select_differences_and_set_the_blame(guests: Guests) -> None:
    class Forgiving(Unix):
        blame_without_journal = Blame.SNAPSHOT

        def differing_pages(self, source: RamFile, destination: RamFile) -> NDArray[np.int64]:
            return super().differing_pages(source, destination)[1:]

    guests.write(1)
    guests.write(2)
    found = guests.compared(Forgiving())
    assert [(page.ram_offset // PAGE, page.blame) for page in found.lost] == [(2, Blame.SNAPSHOT)]


def test_copied_memory_is_refused_if_the_scenario_hands_memory_over(guests: Guests) -> None:
    with pytest.raises(UntestableError, match="but QEMU has copied it"):
        guests.compared(CprTransfer())
    guests.destination = guests.source
    found = guests.compared(CprTransfer())
    assert found.paused is None, "the destination's guest writes to the same memory"
