"""Serve the virtqueues of one VDUSE device, with a journal.

The kernel's messages say when the driver starts, suspends and resets the device, and when the
mappings of IOVAs change. The mappings lead to files: to that of guest RAM, and, while the driver is
QEMU's shadow virtqueue, to those of the rings in QEMU's own memory.

The device has no dirty log. All that it reports is the number of bytes in the used ring, which
covers the first bytes of the request's buffers. So for the evidence, a page has reached the log
when the device has returned the request with a number that covers it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from ..devices import VirtioDevice
from ..devices.segments import take
from ..dma import Dma
from ..errors import ProtocolError
from ..evidence import HARVEST, Evidence, Slot
from ..guest_memory import GuestMemory, IovaMap, IovaMapping, MemorySlot, map_slot
from ..iova_bitmap import IovaRange
from ..journal import Journal
from ..trace import Link, PageEpochs
from ..units import PAGE_BYTES
from ..virtqueue import DescriptorChain, RingAddresses, Segment, SplitVirtqueue
from . import abi
from .chardev import CharacterDevice, Mapped, Message

_DRIVER_OK: Final = 4
_OUTSIDE_RAM: Final = 1 << 52
"""The files other than guest RAM are here on, in the session's own address space."""
_MOST_RAM_BYTES: Final = 2 << 30
"""A PC has at least this much RAM below 4 GiB (pc_q35_init). There, the address of a byte is also
its place in the file."""
_REQUESTS_PER_TURN: Final = 64


def drop_nothing(page: int) -> bool:
    """Return False: the device reports every page."""
    return False


class Session:
    """One VDUSE device and its driver.

    Args:
        chardev: the device in the kernel, which the session owns.
        device: serves the requests.
        queues: the number of virtqueues.
        selector: waits for messages and kicks, and calls the data of its keys.
        drops: returns whether the device never reports a page (address / 4096), as a fault.
    """

    def __init__(
        self,
        chardev: CharacterDevice,
        device: VirtioDevice,
        queues: int,
        selector: selectors.BaseSelector,
        drops: Callable[[int], bool] = drop_nothing,
    ) -> None:
        self.journal = Journal()
        self._chardev = chardev
        self._device = device
        self._selector = selector
        self._drops = drops
        self._queues: list[SplitVirtqueue] = []
        self._bases = [0] * queues
        self._kicks: list[int] = []
        self._dma: Dma | None = None
        self._ram: MemorySlot | None = None
        self._written = self._reported = PageEpochs(())
        self._returned = 0
        selector.register(chardev, selectors.EVENT_READ, self.receive)

    def close(self) -> None:
        """Stop, and destroy the device in the kernel."""
        self._stop()
        self._selector.unregister(self._chardev)
        self._chardev.close()

    # Messages -------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Answer the messages that have arrived."""
        for message in self._chardev.messages():
            self._chardev.answer(message, *self._reply(message))

    def _reply(self, message: Message) -> tuple[bytes, int]:
        """Do what `message` says; return the content and the result of the answer."""
        if message.type == abi.MessageType.GET_VQ_STATE:
            (index,) = abi.U32.unpack_from(message.content)
            return abi.QUEUE_STATE.pack(index, self._positions()[index]), abi.OK
        if message.type == abi.MessageType.SET_STATUS:
            self._set_status(message.content[0])
        elif message.type == abi.MessageType.UPDATE_IOTLB:
            self._unmap()
        elif message.type == abi.MessageType.SUSPEND:
            self._stop()
        else:
            return b"", abi.FAILED
        return b"", abi.OK

    @property
    def _runs(self) -> bool:
        return bool(self._kicks)

    def _positions(self) -> list[int]:
        return [queue.base for queue in self._queues] or self._bases

    def _set_status(self, status: int) -> None:
        if not status & _DRIVER_OK:
            self._stop()
        elif not self._runs:
            indices = range(len(self._bases))
            self._bases = [self._chardev.ring(index).base for index in indices]
            self._kicks = [self._chardev.take_kicks(index) for index in indices]
            for kicks in self._kicks:
                self._selector.register(kicks, selectors.EVENT_READ, lambda fd=kicks: _clear(fd))

    def _stop(self) -> None:
        for kicks in self._kicks:
            self._selector.unregister(kicks)
            os.close(kicks)
        self._kicks = []
        self._unmap()

    # Memory ---------------------------------------------------------------------------------------

    def _unmap(self) -> None:
        """Forget the mappings and the rings in them, but not the rings' positions."""
        self._bases, self._queues, self._dma = self._positions(), [], None

    def _map(self) -> Dma:
        """Map the files, and open the rings in them.

        Raises:
            ProtocolError: the device cannot tell which file is guest RAM, or does not support it.
            MemoryAccessError: a ring is not mapped.
        """
        with contextlib.ExitStack() as files:
            mapped = list(self._chardev.mapped())
            for part in mapped:
                files.callback(os.close, part.fd)
            slots = self._slots_of(mapped)
        bus = IovaMap(
            IovaMapping(part.iova, slots[part.file].gpa + part.file_offset, part.length)
            for part in mapped
        )
        memory = GuestMemory(slots.values())
        dma = Dma(memory, bus, self, self.journal, due_epoch=lambda: self._returned + 1)
        rings = [self._chardev.ring(index) for index in range(len(self._bases))]
        self._queues = [
            SplitVirtqueue(
                dma, RingAddresses(ring.descriptors, ring.driver, ring.device), ring.size, base=base
            )
            for ring, base in zip(rings, self._bases, strict=True)
        ]
        self._dma = dma
        (used, _), *_ = bus.translate(rings[0].device, 2)
        self._journal_if(used >= _OUTSIDE_RAM)
        return dma

    def _slots_of(self, mapped: Sequence[Mapped]) -> dict[tuple[int, int], MemorySlot]:
        """Map each file of the `mapped` IOVAs; the largest one is guest RAM."""
        parts = {part.file: part for part in mapped}
        sizes = {file: os.fstat(part.fd).st_size for file, part in parts.items()}
        ram = max(sizes, key=sizes.__getitem__, default=None)
        if ram is None or not PAGE_BYTES <= sizes[ram] <= _MOST_RAM_BYTES:
            raise ProtocolError(
                f"the driver has mapped files of {sorted(sizes.values())} bytes; expected guest "
                f"RAM in one file of at most {_MOST_RAM_BYTES} bytes that is mapped as shared"
            )
        slots, end = {}, _OUTSIDE_RAM
        for file, part in parts.items():
            gpa = 0 if file == ram else end
            slots[file] = map_slot(part.fd, gpa=gpa, length=sizes[file], hva=0, file_offset=0)
            end += sizes[file]
        if self._ram is None:
            pages = [IovaRange(0, sizes[ram])]
            self._written, self._reported = PageEpochs(pages), PageEpochs(pages)
        self._ram = slots[ram]
        return slots

    def _journal_if(self, is_shadowed: bool) -> None:
        """Record writes only while QEMU's shadow virtqueues see them."""
        if is_shadowed and not self.journal.recording:
            self.journal.start()
        elif not is_shadowed:
            self.journal.stop()

    def dma(self, iova: int, length: int) -> None:
        """Do nothing: no tracker records the writes (see `dmaproof.dma.DmaMarker`)."""

    # Requests -------------------------------------------------------------------------------------

    def serve(self) -> bool:
        """Serve the requests that are available; return whether more of them are.

        Raises:
            ProtocolError, MemoryAccessError: the driver broke the specification.
        """
        if not self._runs:
            return False
        dma = self._dma or self._map()
        busy = False
        for index in reversed(range(len(self._queues))):  # what is sent can then be received
            busy |= self._serve(index, dma)
        return busy

    def _serve(self, index: int, dma: Dma) -> bool:
        queue = self._queues[index]
        self.journal.queue = index
        served = 0
        while served < _REQUESTS_PER_TURN and self._device.is_ready(index):
            chain = queue.pop()
            if chain is None:
                break
            self._return(queue, chain, self._device.process(chain, dma), dma)
            served += 1
        if queue.wants_interrupt():
            self._chardev.interrupt(index)
        return served > 0 or (self._device.is_ready(index) and queue.ask_for_kick())

    def _return(
        self, queue: SplitVirtqueue, chain: DescriptorChain, written: int, dma: Dma
    ) -> None:
        pages = list(_pages(take(chain.writable, 0, written), dma))
        reported = next((before for before, page in pages if self._drops(page)), written)
        queue.push(chain, reported)
        self._returned += 1
        for before, page in pages:
            self._written.see(page * PAGE_BYTES, 1, self._returned)
            if before < reported:
                self._reported.see(page * PAGE_BYTES, 1, self._returned)

    # Evidence -------------------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """Return the evidence of the writes to guest RAM since QEMU has shadowed the virtqueues."""
        records = self.journal.records()
        ram = self._ram
        slots = [] if ram is None else [Slot(0, ram.length, 0, ram.device, ram.inode)]
        links = dict.fromkeys((Link.TRACKER, Link.ITERATOR, Link.TRANSLATION), self._written)
        return Evidence(
            slots=slots,
            records=records[records["gpa"] < np.uint64(_OUTSIDE_RAM)],
            links={**links, Link.LOG: self._reported},
            harvests=np.empty(0, dtype=HARVEST),
            started_ns=self.journal.started_ns,
            requests=self._returned,
        )


def _pages(segments: Sequence[Segment], dma: Dma) -> Iterator[tuple[int, int]]:
    """Yield for each page of `segments` the number of bytes before it, and its number."""
    position = 0
    for iova, length in segments:
        for gpa, size in dma.bus.translate(iova, length):
            for page in range(gpa // PAGE_BYTES, (gpa + size - 1) // PAGE_BYTES + 1):
                yield position + max(0, page * PAGE_BYTES - gpa), page
            position += size


def _clear(kicks: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(kicks, 8)
