"""Both ends of a ring for tests: a driver of the test bed's, and a queue that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from dmaproof.dma import Dma
from dmaproof.guest_memory import Bus, GuestMemory, IovaMap, IovaMapping
from dmaproof.journal import Journal
from dmaproof.virtqueue import PackedVirtqueue, RingAddresses, SplitVirtqueue
from qmp_tools.testbed.ring_driver import (
    PAGE,
    Driver,
    PackedDriver,
    RingDriver,
    guest_memory,
    ram_fd,
)

SIZE: Final = 8
"""Descriptors of a ring, where a test does not say."""
RAM_BYTES: Final = 128 * PAGE
RING: Final = 2 * PAGE
TABLES: Final = 8 * PAGE
DATA: Final = 64 * PAGE
"""In guest RAM, of `RAM_BYTES` from GPA 0: the ring; and room for indirect tables and buffers."""

DRIVERS: Final[dict[str, type[Driver]]] = {"split": RingDriver, "packed": PackedDriver}
"""By the form of their rings."""

_Driver = TypeVar("_Driver", bound=Driver)


class Marks:
    """A tracker that keeps the ranges (IOVA, length) that it is told."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def dma(self, iova: int, length: int) -> None:
        self.ranges.append((iova, length))


@contextmanager
def driver_of(
    make_driver: type[_Driver], size: int = SIZE, *, base: int = RING
) -> Iterator[_Driver]:
    """The driver of a ring of `size` at `base`, in guest RAM of its own."""
    with ram_fd(RAM_BYTES) as fd:
        yield make_driver(guest_memory(fd, (0, RAM_BYTES, 0)), base, size)


def scatter(driver: Driver) -> None:
    """Let the pages of the ring of `driver` lie in RAM in reversed order, no two contiguous."""
    pages = driver.pages
    first, end = pages[0], pages[-1] + PAGE
    driver.bus = IovaMap(
        [
            IovaMapping(0, 0, first),
            *(
                IovaMapping(address, gpa, PAGE)
                for address, gpa in zip(pages, reversed(pages), strict=True)
            ),
            IovaMapping(end, end, driver.memory.end - end),
        ]
    )


def dma_for(
    memory: GuestMemory,
    *,
    bus: Bus | None = None,
    marks: Marks | None = None,
    journal: Journal | None = None,
    make_dma: Callable[..., Dma] = Dma,
) -> Dma:
    """A device's door to `memory`, without an IOMMU unless there is a `bus`."""
    return make_dma(
        memory,
        bus or IovaMap.identity(memory),
        marks or Marks(),
        journal or Journal(),
        due_epoch=lambda: 1,
    )


def queue_for(
    driver: Driver, dma: Dma | None = None, *, base: int | None = None, indirect: bool = True
) -> SplitVirtqueue | PackedVirtqueue:
    """The queue that serves `driver`, from `base` on, or from where a ring begins."""
    make_queue = PackedVirtqueue if isinstance(driver, PackedDriver) else SplitVirtqueue
    return make_queue(
        dma or dma_for(driver.memory, bus=driver.bus),
        RingAddresses(driver.descriptors, driver.available, driver.used),
        driver.size,
        base=driver.base if base is None else base,
        event_index=driver.event_index,
        indirect=indirect,
    )
