"""One ring of a session: the front end's settings, and the virtqueue while the ring runs."""

from __future__ import annotations

import contextlib
import os
import selectors
import struct
import time
from typing import Final

from ..devices import VirtioDevice
from ..dma import Dma
from ..errors import ProtocolError
from ..guest_memory import GuestMemory
from ..virtqueue import PackedVirtqueue, RingAddresses, SplitVirtqueue, Virtqueue
from .features import F_ACCESS_PLATFORM, F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_RING_PACKED
from .inflight import InflightVirtqueue
from .messages import VringAddress

_REQUESTS_PER_TURN: Final = 64
"""The most requests of one ring served before other file descriptors get their turn."""
TURN_S: Final = 0.05
"""No further request is begun after this time: a request may be as large as the disk accepts."""


class Vring:
    """Ring number `index` of a device.

    The ring `runs` from when it is enabled and has a kick file descriptor until it is stopped.
    `base` is the position at which the ring starts, and at which it was stopped. `pending` says
    that the driver may have made requests available. `waiting` says that the ring waits for the
    IOMMU's answer. `queue` is set once the ring's addresses are known.
    """

    def __init__(self, index: int, selector: selectors.BaseSelector) -> None:
        self.index = index
        self.size = 0
        self.base = 0
        self.enabled = False
        self.address: VringAddress | None = None
        self.runs = False
        self.queue: Virtqueue | None = None
        self.pending = False
        self.waiting = False
        self._address_lost = False
        """Whether an address of the queue is no longer mapped."""
        self._areas: list[tuple[int, int]] = []
        """IOVA and length in bytes of the queue's three parts."""
        self._selector = selector
        self._kick_fd: int | None = None
        self._call_fd: int | None = None

    @property
    def may_run(self) -> bool:
        """Whether the ring is enabled and has a kick file descriptor."""
        return self.enabled and self._kick_fd is not None

    def has_work(self, device: VirtioDevice) -> bool:
        """Return whether the ring runs and may have a request that `device` can serve."""
        return self.pending and self.runs and self.enabled and device.is_ready(self.index)

    @property
    def has_addresses(self) -> bool:
        """Whether the ring's addresses in guest RAM are known."""
        return self.queue is not None and not self._address_lost

    def set_kick(self, fd: int) -> None:
        """Take kicks from `fd`, which stays the caller's."""
        self._forget_kick()
        kick_fd = os.dup(fd)
        try:
            self._selector.register(kick_fd, selectors.EVENT_READ, self._kicked)
        except OSError:
            os.close(kick_fd)
            raise
        self._kick_fd = kick_fd
        self.pending = True

    def set_call(self, fd: int | None) -> None:
        """Interrupt the driver through `fd`, which stays the caller's; None if the driver polls."""
        if self._call_fd is not None:
            os.close(self._call_fd)
        self._call_fd = None if fd is None else os.dup(fd)
        if self._call_fd is not None:
            # A back end that died may have returned requests without an interrupt.
            self._interrupt()

    def start(
        self, dma: Dma, memory: GuestMemory, features: int, inflight: memoryview | None = None
    ) -> None:
        """Start the ring, or continue it with a new memory table or new addresses.

        Requests in flight are recorded in the region `inflight`, if it is given.

        Raises:
            ProtocolError: the ring breaks the specification, or its address is not known.
            MemoryAccessError: the ring lies outside guest RAM.
            IotlbMissError: the IOMMU must be asked for the ring's addresses first.
        """
        address = self.address
        if address is None:
            raise ProtocolError(f"ring {self.index} was started before SET_VRING_ADDR")
        self.runs = self.pending = self._address_lost = True
        packed = bool(features & F_RING_PACKED)
        driver_bytes, device_bytes = (4, 4) if packed else (6 + 2 * self.size, 6 + 8 * self.size)
        descriptors = (address.descriptors, 16 * self.size)
        driver = (address.available, driver_bytes)
        device = (address.used, device_bytes)
        if features & F_ACCESS_PLATFORM:
            # The device writes used descriptors of a packed ring over the available ones.
            dma.require([descriptors, driver], [device, *([descriptors] if packed else [])])
        else:
            descriptors, driver, device = (
                (memory.gpa_of_hva(hva, length), length)
                for hva, length in (descriptors, driver, device)
            )
            if address.logged and address.log != device[0]:
                raise ProtocolError(
                    f"SET_VRING_ADDR: the used ring of ring {self.index} is at GPA "
                    f"{device[0]:#x}, but its log address is GPA {address.log:#x}"
                )
        make_queue = PackedVirtqueue if packed else SplitVirtqueue
        queue = make_queue(
            dma,
            RingAddresses(descriptors=descriptors[0], driver=driver[0], device=device[0]),
            self.size,
            base=self.base if self.queue is None else self.queue.base,
            event_index=bool(features & F_RING_EVENT_IDX),
            indirect=bool(features & F_RING_INDIRECT_DESC),
        )
        self.queue = queue if inflight is None else InflightVirtqueue(queue, inflight)
        self._areas = [descriptors, driver, device]
        self._address_lost = self.waiting = False

    def unmap(self, iova: int, length: int) -> None:
        """Mark the addresses as lost if they overlap `length` bytes at `iova`, now unmapped."""
        if any(start < iova + length and iova < start + size for start, size in self._areas):
            self._address_lost = self.pending = True

    def wait_for_iommu(self) -> None:
        """Do nothing until `resume` is called or the driver kicks."""
        self.pending, self.waiting = False, True

    def resume(self) -> None:
        """Continue, because the IOMMU's answers have arrived."""
        self.pending |= self.waiting
        self.waiting = False

    def stop(self) -> None:
        """Stop with no request in flight; afterwards `base` is the ring's position."""
        if isinstance(self.queue, InflightVirtqueue):
            self.queue.end()
        self._detach()

    def _detach(self) -> None:
        self._forget_kick()
        if self.queue is not None:
            self.base = self.queue.base
        self.queue = None
        self._areas = []
        self.runs = self.pending = self.waiting = False

    def close(self) -> None:
        """Close every file descriptor, without stopping the ring: another process may continue."""
        self._detach()
        self.set_call(None)

    def _kicked(self) -> None:
        if self._kick_fd is None:  # the ring was stopped earlier in this turn
            return
        _set_non_blocking(self._kick_fd)
        with contextlib.suppress(BlockingIOError):
            os.read(self._kick_fd, 8)
        self.pending = True

    def _forget_kick(self) -> None:
        if self._kick_fd is not None:
            self._selector.unregister(self._kick_fd)
            os.close(self._kick_fd)
        self._kick_fd = None

    def serve(self, device: VirtioDevice, dma: Dma) -> None:
        """Serve the requests that the driver has made available, up to the limit of a turn.

        Raises:
            ProtocolError, MemoryAccessError: the driver broke the specification.
            IotlbMissError: the IOMMU must be asked for an address of the next request first.
        """
        queue = self.queue
        assert queue is not None
        dma.journal.queue = self.index
        self.pending = True
        end_s = time.monotonic() + TURN_S
        try:
            for _ in range(_REQUESTS_PER_TURN):
                if not device.is_ready(self.index):
                    break
                chain = queue.pop()
                if chain is None:
                    self.pending = queue.ask_for_kick()
                    break
                written = device.process(chain, dma)
                queue.push(chain, written)
                if time.monotonic() >= end_s:
                    break
        finally:
            if queue.wants_interrupt():
                self._interrupt()

    def _interrupt(self) -> None:
        if self._call_fd is not None:
            _set_non_blocking(self._call_fd)
            with contextlib.suppress(BlockingIOError):  # a full counter interrupts the driver too
                os.write(self._call_fd, struct.pack("=Q", 1))


def _set_non_blocking(fd: int) -> None:
    """Make `fd` non-blocking before each use: the front end shares the open file's flags."""
    os.set_blocking(fd, False)
