"""A device behind a virtual IOMMU: it requests mappings, waits, and loses no unmapped page."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from dmaproof.errors import MemoryAccessError, ProtocolError
from dmaproof.guest_memory import READ, WRITE
from dmaproof.iotlb import Miss
from dmaproof.stamp import read_stamp
from dmaproof.vhost_user.backend_channel import BackendChannel
from dmaproof.vhost_user.features import F_ACCESS_PLATFORM, PROTOCOL_FEATURES
from dmaproof.vhost_user.messages import (
    IotlbChange,
    IotlbEvent,
    ProtocolFeature,
    Request,
    encode_iotlb,
    encode_u64,
)
from qmp_tools.testbed.guest_iommu import GuestIommu, Page
from qmp_tools.testbed.ring_driver import (
    HVA_BASE,
    INDIRECT,
    PAGE,
    Buffer,
    Driver,
    PackedDriver,
    RingDriver,
    guest_memory,
    ram_fd,
)
from qmp_tools.testbed.ring_driver import WRITE as WRITABLE
from support.front_end import FrontEnd
from support.rings import scatter

RAM_BYTES = 128 * PAGE
LOG_BYTES = RAM_BYTES // PAGE // 8
RINGS = (8 * PAGE, 12 * PAGE)
HEADER, STATUS, TABLE, DATA = 20 * PAGE, 21 * PAGE + 5, 24 * PAGE, 40 * PAGE
"""Guest-physical addresses. The second page of an indirect table is the page before `TABLE`."""
RING_SIZE = 8


class Guest:
    """A front end, and a driver for each of two rings that maps the buffers for the device."""

    def __init__(
        self,
        ram: int,
        log: int,
        *,
        packed: bool = False,
        scattered: bool = False,
        fault: str | None = None,
    ) -> None:
        self.ram, self.log = ram, log
        self.iommu = GuestIommu()
        self.front_end = FrontEnd(fault=fault, iommu=self.iommu)
        place = (0, RAM_BYTES, 0)
        make = PackedDriver if packed else RingDriver
        # Half of the descriptors and a part of a split ring's used ring are on the next page.
        start = PAGE - 64 if scattered else 0
        self.drivers: list[Driver] = [
            make(guest_memory(ram, place), base + start, RING_SIZE) for base in RINGS
        ]
        if scattered:
            for driver in self.drivers:
                scatter(driver)
        self.front_end.features |= (1 << 34 if packed else 0) | 1 << 28
        self.front_end.send(Request.SET_FEATURES, encode_u64(self.front_end.features))
        self.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES))
        self.front_end.open_channel()
        self.front_end.set_memory(ram, place)
        for index, driver in enumerate(self.drivers):
            self.front_end.start_ring(driver, index)

    def log_on(self) -> None:
        """Switch logging on."""
        self.front_end.set_log(self.log, LOG_BYTES)
        self.front_end.log_all(True)
        for index, driver in enumerate(self.drivers):
            self.front_end.set_ring_address(driver, index=index, logged=True)

    def logged(self) -> set[int]:
        """Take the GPA page numbers out of the log, without those of rings and status bytes."""
        raw = np.frombuffer(os.pread(self.log, LOG_BYTES, 0), np.uint8)
        os.pwrite(self.log, bytes(LOG_BYTES), 0)
        found = np.flatnonzero(np.unpackbits(raw, bitorder="little")).tolist()
        return {page for page in found if page >= DATA // PAGE}

    def map(self, gpa: int, length: int, access: int = READ | WRITE) -> int:
        """See `GuestIommu.map`."""
        return self.iommu.map(gpa, length, access)

    def submit(self, *buffers: Buffer, ring: int = 0, indirect: bool = False) -> None:
        """Make a read of the disk available, into buffers that are already mapped."""
        driver = self.drivers[ring]
        driver.write(HEADER, struct.pack("<IIQ", 0, 0, 80))
        driver.write(STATUS, b"\xff")
        chain = [
            Buffer(self.map(HEADER, 16, READ), 16),
            *buffers,
            Buffer(self.map(STATUS, 1, WRITE), 1, WRITABLE),
        ]
        if not indirect:
            driver.submit(chain)
            return
        if isinstance(driver, RingDriver):
            table = b"".join(descriptor.pack() for descriptor in driver.chain(chain))
        else:
            table = b"".join(
                struct.pack("<QIHH", buffer.address, buffer.length, 0, buffer.flags)
                for buffer in chain
            )
        pages = range(TABLE, TABLE - len(table), -PAGE)
        for number, page in enumerate(pages):
            driver.write(page, table[PAGE * number : PAGE * (number + 1)])
        driver.submit([Buffer(self.iommu.map_pages(pages, READ), len(table), INDIRECT)])

    def kick(self) -> None:
        """Kick, without an answer to the misses of the device."""
        os.eventfd_write(self.front_end.kick, 1)
        self.front_end.turn()

    def requested(self) -> list[int]:
        """Return the IOVAs of the unanswered misses of the device."""
        channel = self.front_end.channel
        assert channel is not None
        if not select.select([channel], [], [], 0)[0]:
            return []
        misses = channel.recv(1 << 16, socket.MSG_PEEK)
        return [iova for (iova,) in struct.iter_unpack("<12xQ24x", misses)]

    @property
    def status(self) -> int:
        """The status of the last request: 0xff until the request is done."""
        return self.drivers[0].read(STATUS, 1)[0]

    def unmap(self, iova: int, length: int) -> None:
        """Remove a mapping, and send the invalidation."""
        self.iommu.unmap(iova, length)
        self.front_end.invalidate(iova, length)


def stamped_lba(guest: Guest, gpa: int) -> int:
    """Return the LBA in the stamp of a page of guest RAM."""
    stamp = read_stamp(guest.drivers[0].read(gpa, PAGE))
    assert stamp is not None
    return stamp[0]


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    with ram_fd(RAM_BYTES) as ram, ram_fd(LOG_BYTES) as log:
        yield ram, log


@pytest.fixture(params=["split", "packed", "split, scattered", "packed, scattered"])
def guest(request: pytest.FixtureRequest, files: tuple[int, int]) -> Iterator[Guest]:
    kind = request.param
    guest = Guest(*files, packed="packed" in kind, scattered="scattered" in kind)
    yield guest
    guest.front_end.close()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_by_iovas_is_logged_by_gpas(guest: Guest, indirect: bool) -> None:
    guest.log_on()
    iova = guest.map(DATA, 2 * PAGE)
    guest.submit(Buffer(iova, 2 * PAGE, WRITABLE), indirect=indirect)
    guest.front_end.serve()
    assert guest.status == 0
    assert [stamped_lba(guest, DATA + at) for at in (0, PAGE)] == [80, 88]
    guest.front_end.session.harvest()
    assert guest.logged() == {DATA // PAGE, DATA // PAGE + 1}
    records = guest.front_end.session.journal.records()
    assert (records["iova"] != records["gpa"]).all()


def test_a_request_waits_until_all_of_its_pages_are_mapped(guest: Guest) -> None:
    guest.front_end.serve()
    known = guest.map(DATA, PAGE)
    guest.submit(
        Buffer(known, PAGE, WRITABLE), Buffer(guest.map(DATA + 8 * PAGE, PAGE), PAGE, WRITABLE)
    )
    unknown = next(page for page in guest.iommu.all_pages() if page.gpa == DATA + 8 * PAGE)
    for page in guest.iommu.all_pages():
        if page != unknown:
            guest.front_end.update(page)
    for _ in range(2):
        guest.kick()
        assert guest.requested() == [unknown.iova], "the device requested the page twice"
        assert guest.status == 0xFF
        assert guest.drivers[0].read(DATA, PAGE) == bytes(PAGE), "the mapped part did not wait"
    guest.front_end.serve()
    assert guest.status == 0
    assert stamped_lba(guest, DATA + 8 * PAGE) == 88


def test_other_rings_are_served_while_one_waits(guest: Guest) -> None:
    guest.front_end.serve()
    guest.submit(Buffer(guest.map(DATA, PAGE), PAGE, WRITABLE))
    before = guest.iommu.all_pages()
    guest.submit(Buffer(guest.map(DATA + PAGE, PAGE), PAGE, WRITABLE), ring=1)
    for page in guest.iommu.all_pages():
        if page not in before:
            guest.front_end.update(page)
    guest.kick()
    guest.kick()  # both rings share one kick event
    assert guest.requested()
    assert not guest.drivers[0].collect()
    assert len(guest.drivers[1].collect()) == 1
    guest.front_end.serve()
    assert len(guest.drivers[0].collect()) == 1


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(None, {DATA // PAGE}), ("unmap-unharvested", set()), ("iova-as-gpa", set())],
)
def test_pages_are_in_the_log_before_their_unmapping_is_answered(
    files: tuple[int, int], fault: str | None, expected: set[int]
) -> None:
    guest = Guest(*files, fault=fault)
    guest.log_on()
    iova = guest.map(DATA, PAGE)
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    guest.unmap(iova, PAGE)
    assert guest.logged() == expected
    # The same IOVA now leads to another page.
    assert guest.map(DATA + 5 * PAGE, PAGE) == iova
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    guest.front_end.session.harvest()
    assert guest.logged() == (set() if fault == "iova-as-gpa" else {DATA // PAGE + 5})
    guest.front_end.close()


def test_mappings_stay_when_the_log_is_switched(guest: Guest) -> None:
    guest.front_end.serve()
    mappings = list(guest.front_end.session.bus.mappings)
    assert mappings
    guest.front_end.set_log(guest.log, LOG_BYTES)
    for on in (True, False):
        guest.front_end.log_all(on)
        assert list(guest.front_end.session.bus.mappings) == mappings


def test_a_page_mapped_at_two_iovas_is_logged_for_both(guest: Guest) -> None:
    guest.log_on()
    first, second = guest.map(DATA, PAGE), guest.map(DATA, PAGE)
    assert first != second
    guest.submit(Buffer(first, 2048, WRITABLE), Buffer(second + 2048, 2048, WRITABLE))
    guest.front_end.serve()
    assert stamped_lba(guest, DATA) == 80
    guest.unmap(first, PAGE)
    assert guest.logged() == {DATA // PAGE}
    guest.unmap(second, PAGE)
    assert guest.logged() == {DATA // PAGE}, "the write to the second IOVA was lost"


def test_an_unmapped_ring_requests_its_addresses_again(guest: Guest) -> None:
    guest.log_on()
    for number in range(3 * RING_SIZE):
        iova = guest.map(DATA + number * PAGE, PAGE)
        guest.submit(Buffer(iova, PAGE, WRITABLE))
        guest.front_end.serve()
        assert guest.status == 0
        assert len(guest.drivers[0].collect()) == 1
        guest.iommu.unmap(iova, PAGE)
        guest.front_end.invalidate(0, 1 << 64)
        assert not guest.front_end.session.bus.mappings
    assert guest.logged() == set(range(DATA // PAGE, DATA // PAGE + 3 * RING_SIZE))


@pytest.mark.parametrize(("packed", "access"), [(False, READ), (True, READ | WRITE)])
def test_a_ring_requests_the_access_that_it_needs(
    files: tuple[int, int], packed: bool, access: int
) -> None:
    guest = Guest(*files, packed=packed)
    guest.kick()
    assert guest.front_end.channel is not None
    misses = struct.iter_unpack("<12xQ16xBx6x", guest.front_end.channel.recv(1 << 16))
    # The descriptors and the driver's part are on the first page, the device's part on the next.
    first = guest.iommu.all_pages()[0].iova
    assert list(misses)[:2] == [(first, access), (first + PAGE, WRITE)]
    guest.front_end.close()


def test_a_ring_requests_the_page_that_was_unmapped(guest: Guest) -> None:
    guest.front_end.serve()
    ring = guest.iommu.all_pages()[: len(guest.drivers[0].pages)]
    for page in ring:
        guest.front_end.invalidate(page.iova, PAGE)
        guest.submit(Buffer(guest.map(DATA, PAGE), PAGE, WRITABLE))
        guest.kick()
        assert guest.requested() == [page.iova]
        guest.front_end.serve()
        assert guest.status == 0
        assert len(guest.drivers[0].collect()) == 1


def test_the_pages_of_a_scattered_indirect_table_are_requested_together(guest: Guest) -> None:
    guest.front_end.serve()
    sectors = PAGE // 16 + 1  # one descriptor more than fits in a page
    data = guest.map(DATA, 512 * sectors)
    buffers = (Buffer(data + 512 * number, 512, WRITABLE) for number in range(sectors))
    guest.submit(*buffers, indirect=True)
    guest.kick()
    table = [page.iova for page in guest.iommu.all_pages() if TABLE - PAGE <= page.gpa <= TABLE]
    assert guest.requested() == table
    assert len(table) == 2
    guest.front_end.serve()
    assert guest.status == 0
    assert stamped_lba(guest, DATA) == 80


def test_a_mapping_is_harvested_before_it_is_replaced(guest: Guest) -> None:
    guest.log_on()
    iova = guest.map(DATA, PAGE)
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    guest.front_end.update(Page(iova, DATA + 9 * PAGE, READ | WRITE))
    assert guest.logged() == {DATA // PAGE}


def test_a_mapping_is_harvested_before_it_is_evicted(guest: Guest) -> None:
    guest.log_on()
    iova = guest.map(DATA, PAGE)
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    # Each page lies in its own range, far from the range of the earlier IOVAs.
    for number in range(2, 10):
        assert iova in [mapping.iova for mapping in guest.front_end.session.bus.mappings]
        guest.front_end.update(Page(number << 32, DATA, READ))
    assert [mapping.iova for mapping in guest.front_end.session.bus.mappings] == [9 << 32]
    assert guest.logged() == {DATA // PAGE}
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.kick()
    assert guest.iommu.all_pages()[0].iova in guest.requested(), "the ring was not evicted"
    guest.front_end.serve()
    assert guest.status == 0


def test_access_rights_of_two_updates_add_up(guest: Guest) -> None:
    page = Page(guest.map(DATA, PAGE), DATA, READ)
    guest.front_end.update(page)
    guest.front_end.update(page._replace(access=WRITE))
    bus = guest.front_end.session.bus
    assert bus.translate(page.iova, PAGE, READ | WRITE) == [(DATA, PAGE)]


def test_a_new_memory_table_removes_all_mappings(guest: Guest) -> None:
    guest.log_on()
    iova = guest.map(DATA, PAGE)
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    guest.front_end.set_memory(guest.ram, (0, RAM_BYTES, 0))
    assert not guest.front_end.session.bus.mappings
    assert guest.logged() == {DATA // PAGE}
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    assert guest.status == 0


def test_a_request_that_waits_when_the_ring_stops_stays_available(guest: Guest) -> None:
    guest.front_end.track_inflight(2, RING_SIZE)
    for index, driver in enumerate(guest.drivers):
        guest.front_end.set_ring_address(driver, index=index)
    guest.front_end.serve()
    iova = guest.map(DATA, PAGE)
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.kick()
    assert guest.requested()
    base = struct.pack("<II", 0, 0)
    answer = guest.front_end.ask(Request.GET_VRING_BASE, base)
    guest.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", 1, 0))
    assert struct.unpack("<II", answer)[1] == guest.drivers[0].base, "the request was taken"
    guest.iommu.unmap(iova, PAGE)
    guest.front_end.answer_misses()  # too late: the missing page no longer matters
    assert guest.map(DATA, PAGE) == iova
    guest.front_end.start_ring(guest.drivers[0])
    guest.front_end.serve()
    assert guest.status == 0
    assert len(guest.drivers[0].collect()) == 1


def test_an_iova_that_leads_nowhere_is_refused(guest: Guest) -> None:
    guest.submit(Buffer(0x1234_5000, PAGE, WRITABLE))
    with pytest.raises(
        MemoryAccessError, match=r"IOVA 0x12345000: .* does not permit .* write to it"
    ):
        guest.front_end.serve()


@pytest.mark.parametrize("iova", [(1 << 48) - PAGE, 1 << 48, (1 << 64) - PAGE])
def test_an_iova_beyond_48_bits_is_refused_without_a_request(guest: Guest, iova: int) -> None:
    guest.submit(Buffer(iova, 2 * PAGE, WRITABLE))
    with pytest.raises(MemoryAccessError, match=f"IOVA {iova:#x} .* reaches beyond the 48 bits"):
        guest.front_end.serve()


def test_a_read_without_a_mapping_is_reported_as_a_read(guest: Guest) -> None:
    guest.submit(Buffer(0x1234_5000, PAGE))
    with pytest.raises(MemoryAccessError, match="does not permit the device to read from it"):
        guest.front_end.serve()


def test_a_read_only_page_is_not_written(guest: Guest) -> None:
    guest.submit(Buffer(guest.map(DATA, PAGE, READ), PAGE, WRITABLE))
    with pytest.raises(MemoryAccessError, match="does not permit the device to write to it"):
        guest.front_end.serve()


def test_an_unmapped_iova_is_refused_if_the_device_cannot_request_it(guest: Guest) -> None:
    features = PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK
    guest.front_end.send(Request.SET_PROTOCOL_FEATURES, encode_u64(features))
    with pytest.raises(ProtocolError, match="must send SET_BACKEND_REQ_FD and accept"):
        guest.front_end.serve()


def test_without_the_feature_there_is_no_iotlb(guest: Guest) -> None:
    features = guest.front_end.features & ~F_ACCESS_PLATFORM
    for index in range(2):
        guest.front_end.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0))
    guest.front_end.send(Request.SET_FEATURES, encode_u64(features))
    with pytest.raises(ProtocolError, match="VIRTIO_F_ACCESS_PLATFORM was not accepted"):
        guest.front_end.invalidate(0, PAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (IotlbChange(IotlbEvent.MISS, 0, PAGE, HVA_BASE, 3), "a front end must not send type 1"),
        (IotlbChange(IotlbEvent.UPDATE, 0, 0, HVA_BASE, 3), "is empty"),
        (IotlbChange(IotlbEvent.UPDATE, 0, PAGE, HVA_BASE, 0), "permissions 0x1 to 0x3, got 0x0"),
        (IotlbChange(IotlbEvent.UPDATE, 0, PAGE, 0, 3), "not inside one memory slot"),
        (IotlbChange(IotlbEvent.UPDATE, 8, PAGE, HVA_BASE, 3), "whole pages"),
        (IotlbChange(IotlbEvent.UPDATE, 1 << 48, PAGE, HVA_BASE, 3), "48 bits"),
        (IotlbChange(IotlbEvent.INVALIDATE, PAGE, 0, 0, 0), "is empty"),
        (IotlbChange(IotlbEvent.INVALIDATE, (1 << 64) - PAGE, 2 * PAGE, 0, 0), "leaves the 64-bit"),
    ],
)
def test_malformed_iotlb_messages_are_refused(
    files: tuple[int, int], change: IotlbChange, message: str
) -> None:
    guest = Guest(*files)
    with pytest.raises(ProtocolError, match=message):
        guest.front_end.send(Request.IOTLB_MSG, encode_iotlb(change))
    guest.front_end.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (struct.pack("<IIIQ", 1, 5, 8, 0), "the device has sent no request"),
        (struct.pack("<IIIQ", 2, 5, 8, 0), "got request 2"),
        (struct.pack("<IIIQ", 1, 1, 8, 0), "flags 0x1"),
        (struct.pack("<IIIQ", 1, 5, 9, 0), "9 bytes"),
    ],
)
def test_malformed_answers_are_refused(files: tuple[int, int], answer: bytes, message: str) -> None:
    guest = Guest(*files)
    assert guest.front_end.channel is not None
    guest.front_end.channel.sendall(answer)
    with pytest.raises(ProtocolError, match=message):
        guest.front_end.turn()
    guest.front_end.close()


def test_a_channel_that_is_not_a_socket_is_refused(guest: Guest) -> None:
    with pytest.raises(ProtocolError, match="SET_BACKEND_REQ_FD"):
        guest.front_end.send(Request.SET_BACKEND_REQ_FD, fds=[guest.ram])


def test_a_channel_that_is_closed_ends_the_session(guest: Guest) -> None:
    assert guest.front_end.channel is not None
    guest.front_end.channel.close()
    with pytest.raises(EOFError, match="closed the back-end channel"):
        guest.front_end.turn()


def test_a_full_channel_is_refused_and_a_closed_one_ends_the_session() -> None:
    back_end, front_end = socket.socketpair()
    with back_end, front_end, selectors.DefaultSelector() as selector:
        channel = BackendChannel(back_end.fileno(), selector)
        back_end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                back_end.send(bytes(1 << 16))
        back_end.setblocking(True)  # the channel must not wait, although its socket is blocking
        with pytest.raises(
            ProtocolError, match="does not read the requests on the back-end channel"
        ):
            channel.ask([Miss(0, READ)])
        front_end.close()
        with pytest.raises(EOFError, match="the back-end channel"):
            channel.ask([Miss(0, READ)])
        channel.close()


MISS = struct.Struct("<IIIQQQBB6x")
ANSWER = struct.Struct("<IIIQ")


def test_a_miss_has_the_layout_of_the_specification() -> None:
    back_end, front_end = socket.socketpair()
    with back_end, front_end, selectors.DefaultSelector() as selector:
        channel = BackendChannel(back_end.fileno(), selector)
        channel.ask([Miss(0x1234_5000, WRITE)])
        version_1_needs_reply = 1 | 1 << 3
        assert front_end.recv(1 << 10) == MISS.pack(
            *(1, version_1_needs_reply, 32),
            *(0x1234_5000, 0, 0, WRITE, IotlbEvent.MISS),
        )
        channel.close()


def test_a_page_is_requested_only_once() -> None:
    back_end, front_end = socket.socketpair()
    first, second = Miss(PAGE, READ), Miss(2 * PAGE, READ)
    with back_end, front_end, selectors.DefaultSelector() as selector:
        channel = BackendChannel(back_end.fileno(), selector)
        channel.ask([first])
        channel.ask([first, second])
        requests = list(MISS.iter_unpack(front_end.recv(1 << 10)))
        assert [request[3] for request in requests] == [PAGE, 2 * PAGE]
        channel.close()


def test_answers_may_arrive_in_pieces() -> None:
    back_end, front_end = socket.socketpair()
    misses = [Miss(PAGE, READ), Miss(2 * PAGE, READ)]
    answers = ANSWER.pack(1, 5, 8, 0) + ANSWER.pack(1, 5, 8, 1)
    with back_end, front_end, selectors.DefaultSelector() as selector:
        channel = BackendChannel(back_end.fileno(), selector)
        channel.ask(misses)
        found = []
        for piece in (answers[:5], answers[5:]):
            front_end.sendall(piece)
            for key, _ in selector.select(0):
                key.data()
            found.append(channel.answers())
        assert found == [[], [(misses[0], True), (misses[1], False)]]
        assert not channel.waiting
        channel.close()


def test_a_reset_harvests_before_it_removes_the_mappings(guest: Guest) -> None:
    guest.log_on()
    guest.submit(Buffer(guest.map(DATA + 3 * PAGE, PAGE), PAGE, WRITABLE))
    guest.front_end.serve()
    assert guest.status == 0
    assert guest.logged() == set(), "a harvest happened before the reset"
    guest.front_end.send(Request.RESET_DEVICE)
    assert guest.logged() == {DATA // PAGE + 3}
    assert list(guest.front_end.session.bus.mappings) == []


def test_a_stopped_ring_leaves_the_mappings_to_the_other_ring(guest: Guest) -> None:
    guest.log_on()
    iova = guest.map(DATA, PAGE)
    guest.submit(Buffer(iova, PAGE, WRITABLE))
    guest.front_end.serve()
    guest.front_end.stop_ring(0)
    assert guest.logged() == {DATA // PAGE}
    assert list(guest.front_end.session.bus.mappings)
    guest.submit(Buffer(guest.map(DATA + PAGE, PAGE), PAGE, WRITABLE), ring=1)
    guest.front_end.serve()
    assert guest.status == 0
    guest.unmap(iova, PAGE)
    guest.front_end.stop_ring(1)
    assert guest.logged() == {DATA // PAGE + 1}
    assert list(guest.front_end.session.bus.mappings) == []
