"""One ring of a session: what the front end has said of it, and the virtqueue once it runs."""

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
"""How many requests of one ring are served before the other file descriptors get their turn."""
TURN_S: Final = 0.05
"""So long at the most, and one request more: a driver may make them as large as a disk takes."""


class Vring:
    """Ring number `index` of a device.

    It `runs` from the moment it is both enabled and has a kick file descriptor until it is stopped.
    `base` is where it begins, and where it stood when it was stopped. `pending` says that the
    driver may have made something available, `waits` that an IOMMU has been asked for what is
    needed to go on. Its `queue` is there once its addresses are known.
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
        self.waits = False
        self._lost = False
        """Whether an address of the queue leads nowhere any more."""
        self._areas: list[tuple[int, int]] = []
        """IOVA and length of the queue's three parts."""
        self._selector = selector
        self._kick_fd: int | None = None
        self._call_fd: int | None = None

    @property
    def may_run(self) -> bool:
        """Whether the front end has said all that makes a ring run."""
        return self.enabled and self._kick_fd is not None

    def has_work(self, device: VirtioDevice) -> bool:
        """Whether the ring runs and is to be looked at."""
        return self.pending and self.runs and self.enabled and device.is_ready(self.index)

    @property
    def has_addresses(self) -> bool:
        """Whether it is known where the ring stands in RAM."""
        return self.queue is not None and not self._lost

    def set_kick(self, fd: int) -> None:
        """The driver kicks by `fd`, which stays the caller's, from now on."""
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
        """The driver is to be interrupted by `fd`, which stays the caller's; None: it polls."""
        if self._call_fd is not None:
            os.close(self._call_fd)
        self._call_fd = None if fd is None else os.dup(fd)
        if self._call_fd is not None:
            self._interrupt()  # a back end that died may have given back requests and not told

    def start(
        self, dma: Dma, memory: GuestMemory, features: int, inflight: memoryview | None = None
    ) -> None:
        """Run where the front end says; or go on by a new memory table, or at new addresses.

        Requests in flight are noted in the region `inflight`, if there is one.

        Raises:
            ProtocolError: the ring breaks the specification, or its address is not known.
            MemoryAccessError: it lies outside guest RAM.
            IotlbMissError: the IOMMU has to be asked for its address first.
        """
        address = self.address
        if address is None:
            raise ProtocolError("a ring was started before SET_VRING_ADDR")
        self.runs = self.pending = self._lost = True
        packed = bool(features & F_RING_PACKED)
        driver_bytes, device_bytes = (4, 4) if packed else (6 + 2 * self.size, 6 + 8 * self.size)
        descriptors = (address.descriptors, 16 * self.size)
        driver = (address.available, driver_bytes)
        device = (address.used, device_bytes)
        if features & F_ACCESS_PLATFORM:
            # A packed ring's answers are written over its descriptors.
            dma.require([descriptors, driver], [device, *([descriptors] if packed else [])])
        else:
            descriptors, driver, device = (
                (memory.gpa_of_hva(hva, length), length)
                for hva, length in (descriptors, driver, device)
            )
            if address.logged and address.log != device[0]:
                raise ProtocolError(
                    f"SET_VRING_ADDR: ring {self.index}'s used ring is at GPA {device[0]:#x}, but "
                    f"its writes are to be logged at {address.log:#x}"
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
        self._lost = self.waits = False

    def unmap(self, iova: int, length: int) -> None:
        """Nothing leads from `length` bytes at `iova` any more."""
        if any(start < iova + length and iova < start + size for start, size in self._areas):
            self._lost = self.pending = True

    def wait(self) -> None:
        """Do nothing until `go_on` is called, or the driver kicks."""
        self.pending, self.waits = False, True

    def go_on(self) -> None:
        """What was asked for has been answered."""
        self.pending |= self.waits
        self.waits = False

    def stop(self) -> None:
        """Serve no more, with nothing in flight; `base` then says where the ring stands."""
        if isinstance(self.queue, InflightVirtqueue):
            self.queue.end()
        self._leave()

    def _leave(self) -> None:
        self._forget_kick()
        if self.queue is not None:
            self.base = self.queue.base
        self.queue = None
        self._areas = []
        self.runs = self.pending = self.waits = False

    def close(self) -> None:
        """Let go of every file descriptor. The ring was not stopped: another may go on with it."""
        self._leave()
        self.set_call(None)

    def _kicked(self) -> None:
        if self._kick_fd is None:  # the ring was stopped in this very turn
            return
        _never_wait(self._kick_fd)
        with contextlib.suppress(BlockingIOError):
            os.read(self._kick_fd, 8)
        self.pending = True

    def _forget_kick(self) -> None:
        if self._kick_fd is not None:
            self._selector.unregister(self._kick_fd)
            os.close(self._kick_fd)
        self._kick_fd = None

    def serve(self, device: VirtioDevice, dma: Dma) -> None:
        """Serve what the driver has made available, up to a turn's share.

        Raises:
            ProtocolError, MemoryAccessError: the driver broke the specification.
            IotlbMissError: the IOMMU has to be asked for an address of the next request first.
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
            _never_wait(self._call_fd)
            with contextlib.suppress(BlockingIOError):  # the counter is full: it is seen anyway
                os.write(self._call_fd, struct.pack("=Q", 1))


def _never_wait(fd: int) -> None:
    """Each time anew: the front end shares the open file, and whether it blocks with it."""
    os.set_blocking(fd, False)
