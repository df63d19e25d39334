"""Both ends of a ring for tests: a driver of the test bed, and the queue that serves it."""

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
"""The default number of descriptors of a ring."""
RAM_BYTES: Final = 128 * PAGE
RING: Final = 2 * PAGE
TABLES: Final = 8 * PAGE
DATA: Final = 64 * PAGE
"""GPAs of the ring, of the indirect tables and of the buffers; RAM begins at GPA 0."""

DRIVERS: Final[dict[str, type[Driver]]] = {"split": RingDriver, "packed": PackedDriver}
"""The drivers by the form of their rings."""

_Driver = TypeVar("_Driver", bound=Driver)


class Marks:
    """A tracker that records the reported ranges (IOVA, length)."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def dma(self, iova: int, length: int) -> None:
        self.ranges.append((iova, length))


@contextmanager
def driver_of(
    make_driver: type[_Driver], size: int = SIZE, *, base: int = RING
) -> Iterator[_Driver]:
    """Yield the driver of a ring of `size` at `base`, in its own guest RAM."""
    with ram_fd(RAM_BYTES) as fd:
        yield make_driver(guest_memory(fd, (0, RAM_BYTES, 0)), base, size)


def scatter(driver: Driver) -> None:
    """Map the pages of the ring of `driver` in reversed order, so that no two are contiguous."""
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
    """Return a device's `Dma` to `memory`, without an IOMMU unless `bus` is given."""
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
    """Return the queue that serves `driver` from `base` on, by default from the initial base."""
    make_queue = PackedVirtqueue if isinstance(driver, PackedDriver) else SplitVirtqueue
    return make_queue(
        dma or dma_for(driver.memory, bus=driver.bus),
        RingAddresses(driver.descriptors, driver.available, driver.used),
        driver.size,
        base=driver.base if base is None else base,
        event_index=driver.event_index,
        indirect=indirect,
    )
