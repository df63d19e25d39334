"""The VDUSE device's session, with a simulated kernel and a shadow virtqueue as its driver."""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable, Iterator

import pytest

from dmaproof.devices import make_device
from dmaproof.errors import ProtocolError
from dmaproof.guest_memory import GuestMemory, map_slot
from dmaproof.trace import Link
from dmaproof.units import PAGE_BYTES
from dmaproof.vduse import abi
from dmaproof.vduse.chardev import Mapped, Message, Ring
from dmaproof.vduse.session import Session, drop_nothing
from qmp_tools.testbed.ring_driver import WRITE, Buffer, RingDriver

RAM_BYTES = 64 * PAGE_BYTES
RINGS_BYTES = 16 * PAGE_BYTES
RAM_IOVA = 0x4000_0000
RINGS_IOVA = 0x1000
RECEIVED, SENT = 20 * PAGE_BYTES, 40 * PAGE_BYTES
"""The places of the buffers in RAM."""
HEADER = bytes(12)


class Kernel:
    """A VDUSE device's character device, whose driver maps guest RAM and the rings' memory."""

    def __init__(self, ram: int, rings: int) -> None:
        self.files = {RAM_IOVA: ram, RINGS_IOVA: rings}
        self.drivers: list[RingDriver] = []
        self.waiting: list[Message] = []
        self.answers: list[tuple[bytes, int]] = []
        self.interrupts: list[int] = []
        self._file = os.eventfd(0)

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        os.close(self._file)

    def messages(self) -> Iterator[Message]:
        while self.waiting:
            yield self.waiting.pop(0)

    def answer(self, message: Message, content: bytes = b"", result: int = abi.OK) -> None:
        self.answers.append((content, result))

    def ring(self, index: int) -> Ring:
        driver = self.drivers[index]
        return Ring(driver.size, driver.descriptors, driver.available, driver.used, 0, True)

    def mapped(self) -> Iterator[Mapped]:
        for iova, fd in sorted(self.files.items()):
            status = os.fstat(fd)
            file = status.st_dev, status.st_ino
            yield Mapped(iova, status.st_size, 0, os.dup(fd), file)

    def take_kicks(self, index: int) -> int:
        return os.eventfd(0, os.EFD_NONBLOCK)

    def interrupt(self, index: int) -> None:
        self.interrupts.append(index)


class Machine:
    """A session whose driver is a shadow virtqueue; `rings_iova` is where the rings are."""

    def __init__(
        self, drops: Callable[[int], bool] = drop_nothing, rings_iova: int = RINGS_IOVA
    ) -> None:
        ram, rings = os.memfd_create("ram"), os.memfd_create("rings")
        os.ftruncate(ram, RAM_BYTES)
        os.ftruncate(rings, RINGS_BYTES)
        self.memory = GuestMemory(
            map_slot(fd, gpa=iova, length=size, hva=0, file_offset=0)
            for iova, fd, size in (
                (RAM_IOVA, ram, RAM_BYTES),
                (RINGS_IOVA, rings, RINGS_BYTES),
            )
        )
        self.kernel = Kernel(ram, rings)
        self.kernel.drivers = [
            RingDriver(self.memory, rings_iova),
            RingDriver(self.memory, rings_iova + 4 * PAGE_BYTES),
        ]
        self.session = Session(
            self.kernel,  # type: ignore[arg-type]
            make_device("echo"),
            2,
            selectors.DefaultSelector(),
            drops,
        )
        self.tell(abi.MessageType.SET_STATUS, b"\x07")

    def tell(self, type_: int, content: bytes = b"") -> tuple[bytes, int]:
        self.kernel.waiting.append(Message(type_, 1, content.ljust(128, b"\0")))
        self.session.receive()
        return self.kernel.answers[-1]

    def exchange(self, payload: bytes, place: int = RECEIVED) -> tuple[bytes, int]:
        """Send a frame; return what came back to `place` in RAM, and the reported length."""
        receive, send = self.kernel.drivers
        receive.submit(
            [
                Buffer(RAM_IOVA + PAGE_BYTES, len(HEADER), WRITE),
                Buffer(RAM_IOVA + place, len(payload), WRITE),
            ]
        )
        send.write(RAM_IOVA + SENT, HEADER + payload)
        send.submit([Buffer(RAM_IOVA + SENT, len(HEADER) + len(payload))])
        while self.session.serve():
            pass
        ((_, length),) = receive.collect()
        send.collect()
        return receive.read(RAM_IOVA + place, len(payload)), length

    def pages(self, link: Link) -> set[int]:
        evidence = self.session.evidence()
        return set(evidence.links[link].array.nonzero()[0].tolist())


def test_a_frame_comes_back_and_its_length_reports_its_pages() -> None:
    machine = Machine()
    assert machine.exchange(b"frame" * 20) == (b"frame" * 20, 112)
    records = machine.session.evidence().records
    assert records["gpa"].tolist() == [PAGE_BYTES, RECEIVED]
    assert machine.pages(Link.LOG) == {1, RECEIVED // PAGE_BYTES}
    assert machine.kernel.interrupts


def test_the_evidence_has_guest_ram_as_its_only_slot() -> None:
    machine = Machine()
    machine.exchange(b"frame")
    (slot,) = machine.session.evidence().slots
    assert (slot.gpa, slot.length) == (0, RAM_BYTES)


def test_a_dropped_page_is_written_but_not_covered_by_the_length() -> None:
    dropped = RECEIVED // PAGE_BYTES
    machine = Machine(lambda page: page == dropped)
    assert machine.exchange(b"frame") == (b"frame", len(HEADER))
    assert machine.pages(Link.TRACKER) == {1, dropped}
    assert machine.pages(Link.LOG) == {1}
    due = machine.session.evidence().records["epoch"][-1]
    assert machine.session.evidence().links[Link.TRACKER].last(RECEIVED) == due


def test_a_buffer_over_two_pages_is_reported_up_to_the_dropped_page() -> None:
    place = RECEIVED + PAGE_BYTES - 2
    machine = Machine(lambda page: page == RECEIVED // PAGE_BYTES + 1)
    assert machine.exchange(b"frame", place) == (b"frame", len(HEADER) + 2)


def test_writes_are_journalled_only_while_qemu_shadows_the_rings() -> None:
    machine = Machine(rings_iova=RAM_IOVA)
    machine.exchange(b"frame", RECEIVED)
    assert len(machine.session.evidence().records) == 0


def test_a_suspended_device_serves_nothing_and_reports_its_position() -> None:
    machine = Machine()
    machine.exchange(b"frame")
    assert machine.tell(abi.MessageType.SUSPEND) == (b"", abi.OK)
    assert not machine.session.serve()
    answer = machine.tell(abi.MessageType.GET_VQ_STATE, abi.U32.pack(1))
    assert answer == (abi.QUEUE_STATE.pack(1, 1), abi.OK)


def test_new_mappings_do_not_move_the_rings_positions() -> None:
    machine = Machine()
    machine.exchange(b"first")
    assert machine.tell(abi.MessageType.UPDATE_IOTLB)[1] == abi.OK
    assert machine.exchange(b"second")[0] == b"second"


def test_an_unknown_message_is_refused() -> None:
    assert Machine().tell(99) == (b"", abi.FAILED)


def test_guest_ram_that_is_not_a_shared_file_is_refused() -> None:
    machine = Machine()
    machine.kernel.files.clear()
    with pytest.raises(ProtocolError, match="expected guest RAM in one file"):
        machine.session.serve()
