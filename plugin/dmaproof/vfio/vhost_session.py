"""A vhost-user device whose DMA a VFIO device does, and whose dirty pages the kernel tracks.

A dirty page takes the same path as with any other device of dmaproof, except at the beginning::

    slots of the front end ──map──▶ the VFIO device's I/O address space
    Dma.write ──▶ the VFIO device ──DMA──▶ guest RAM
                        └──▶ its log, or its IOMMU's, or type1's ──▶ KernelTracker ──▶ the collector

A *stand-in* is this VFIO device, which a session uses instead of an emulated tracker. It is opened
for one session, and closed with the session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from ..devices import VirtioDevice
from ..dirty_tracker import EmulatedTracker
from ..dma import Dma
from ..guest_memory import GuestMemory, IovaMap
from ..iova_bitmap import IovaBitmap, IovaRange
from ..vhost_user.features import F_ACCESS_PLATFORM
from ..vhost_user.session import Session
from .requests import address_of
from .trackers import KernelTracker


class IoAddressSpace(Protocol):
    """The IOVA mappings of one VFIO device: an `Ioas` or a `Container`."""

    def map(self, iova: int, address: int, length: int) -> None:
        """Map `length` bytes of this process at `address` to `iova`, readable and writable."""

    def unmap(self, iova: int, length: int) -> None:
        """Remove a mapping."""


class StandIn(EmulatedTracker):
    """A VFIO device that writes guest RAM in place of an emulated device.

    `write(iova, data)` makes the device write by DMA, and returns when the data is written.
    `release` closes everything that was opened for the device.
    """

    name: ClassVar[str] = "vfio"

    def __init__(
        self,
        space: IoAddressSpace,
        tracker: KernelTracker,
        write: Callable[[int, memoryview], None],
        release: Callable[[], None],
    ) -> None:
        self.write = write
        self._space = space
        self._tracker = tracker
        self._release = release
        self._memory = GuestMemory(())

    def map_bus(self, memory: GuestMemory) -> IovaMap:
        """Replace all mappings by the slots of `memory`, at their guest-physical addresses.

        Raises:
            VfioError: the kernel cannot map a slot.
        """
        for slot in self._memory.slots:
            self._space.unmap(slot.gpa, slot.length)
        self._memory = GuestMemory(())
        for slot in memory.slots:
            self._space.map(slot.gpa, address_of(slot.bytes), slot.length)
        self._memory = memory
        return IovaMap.identity(memory)

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        """Make a `Dma` that writes through the device, from the arguments of `Dma`."""
        return _StandInDma(self.write, *arguments, **options)

    def dma(self, iova: int, length: int) -> None:
        """Do nothing: the hardware itself tracks what it wrote."""

    def start(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        return self._tracker.start(ranges, page_size)

    def stop(self) -> None:
        self._tracker.stop()

    def read_and_clear(self, bitmap: IovaBitmap, iova: int, length: int) -> None:
        self._tracker.read_and_clear(bitmap, iova, length)

    def close(self) -> None:
        """Release the device and guest RAM."""
        self._release()
        self._memory = GuestMemory(())


class _StandInDma(Dma):
    def __init__(
        self, write: Callable[[int, memoryview], None], *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._write = write

    def _store(self, iova: int, target: memoryview, data: memoryview) -> None:
        self._write(iova, data)


class StandInSession(Session):
    """Serves one front end with a device whose DMA `stand_in` does, and closes `stand_in`.

    A virtual IOMMU is not offered. The other arguments are those of `Session`.
    """

    def __init__(
        self,
        connection: Any,
        device: VirtioDevice,
        stand_in: StandIn,
        *others: Any,
        withheld: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            connection,
            device,
            stand_in,
            *others,
            withheld=withheld | F_ACCESS_PLATFORM,
            make_dma=stand_in.make_dma,
            map_bus=stand_in.map_bus,
            **options,
        )
        self._stand_in = stand_in

    def close(self) -> None:
        super().close()
        self._stand_in.close()
