"""A device's only access to guest RAM: data, journal, tracker and harvest follow in this order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmaproof.dma import Dma
from dmaproof.errors import MemoryAccessError
from dmaproof.guest_memory import GuestMemory, IovaMap, IovaMapping
from dmaproof.journal import Journal
from qmp_tools.testbed.ring_driver import PAGE, guest_memory, ram_fd

IOVA = 0x100000
GPAS = (5 * PAGE, 2 * PAGE, 9 * PAGE)
"""The GPAs of the three pages from `IOVA` on."""


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ram_fd(16 * PAGE) as fd:
        yield guest_memory(fd, (0, 16 * PAGE, 0))


def test_a_write_over_three_mappings_makes_three_records_and_one_tracker_call(
    memory: GuestMemory,
) -> None:
    calls: list[tuple[str, int, int]] = []
    data = bytes(range(256)) * 32
    start = IOVA + PAGE - 100

    class Tracker:
        def dma(self, iova: int, length: int) -> None:
            assert bytes(memory.view(GPAS[0] + PAGE - 100, 100)) == data[:100], "not yet in RAM"
            calls.append(("tracker", iova, length))

    journal = Journal()
    journal.start()
    dma = Dma(
        memory,
        IovaMap(IovaMapping(IOVA + at * PAGE, gpa, PAGE) for at, gpa in enumerate(GPAS)),
        Tracker(),
        journal,
        due_epoch=lambda: 7,
        after_write=lambda iova, length: calls.append(("after", iova, length)),
    )
    dma.write(start, data[: PAGE + 300])
    records = journal.records()
    assert records["iova"].tolist() == [start, IOVA + PAGE, IOVA + 2 * PAGE]
    assert records["gpa"].tolist() == [GPAS[0] + PAGE - 100, GPAS[1], GPAS[2]]
    assert records["length"].tolist() == [100, PAGE, 200]
    assert records["epoch"].tolist() == [7, 7, 7]
    assert calls == [("tracker", start, PAGE + 300), ("after", start, PAGE + 300)]
    assert dma.read(start, PAGE + 300) == data[: PAGE + 300]
    with pytest.raises(MemoryAccessError, match="nothing is mapped"):
        dma.write(IOVA + 3 * PAGE - 1, b"ab")
    assert len(journal.records()) == 3
    assert dma.read(IOVA + 3 * PAGE - 1, 1) == b"\0"
    assert len(calls) == 2
