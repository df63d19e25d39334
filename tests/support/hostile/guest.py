"""Valid and invalid actions of a guest on its rings."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence

from dmaproof.devices.net import ETHERTYPE
from qmp_tools.testbed.ring_driver import INDIRECT, NEXT, PAGE, WRITE
from support.hostile.layout import (
    AVAIL,
    DATA,
    DISK_BYTES,
    HEADER,
    HIGH_BYTES,
    HIGH_OFFSET,
    LOG_OFFSET,
    LOW,
    QUEUE_SIZE,
    RINGS,
    STATUS,
    TABLE,
    USED,
)
from support.hostile.peer import Peer


def put(peer: Peer, gpa: int, data: bytes) -> None:
    """Write guest RAM, as the guest."""
    for start, length, offset in (LOW, (peer.high, HIGH_BYTES, HIGH_OFFSET)):
        if start <= gpa and gpa + len(data) <= start + length:
            peer.ram.write(offset + gpa - start, data)


def descriptor(peer: Peer, entries: int) -> bytes:
    """Return a descriptor of a split ring, valid or not."""
    return struct.pack("<QIHH", *fields(peer, entries))


def fields(peer: Peer, entries: int) -> tuple[int, int, int, int]:
    """Return a descriptor's address, length, flags and next index."""
    address = peer.number(DATA, HEADER, STATUS, TABLE, peer.high, *RINGS, LOW[1] - 8)
    length = peer.number(16, 1, 512, PAGE, 0xFFFFFFFF, 32 << 20, 0) & 0xFFFFFFFF
    flags = peer.source.pick((NEXT, NEXT, WRITE, WRITE | NEXT, 0, INDIRECT, 7, 0xFFFF))
    following = peer.source.pick((*range(entries), entries, 0xFFFF))
    return address, length, flags, following


def honest_request(peer: Peer) -> None:
    """Make a request available that should succeed."""
    ring = peer.source.integer(0, peer.rings - 1)
    size = peer.source.pick((512, PAGE, 3 * PAGE, 100))
    target = peer.source.pick((DATA + peer.source.integer(0, PAGE), peer.high, *RINGS))
    if peer.device.name == "blk":
        chain = disk_request(peer, target, size)
    elif peer.device.name == "net" and ring == 1:
        frame = struct.pack("!12x12xHI", ETHERTYPE, peer.source.pick((1, 0x01000000)))
        put(peer, HEADER, frame)
        chain = [(HEADER, len(frame), 0)]
    else:
        chain = [(target, size, WRITE)]
    if peer.packed:
        publish_packed(peer, ring, [(*part, 0) for part in chain])
        return
    for index, part in enumerate(chain):
        put(peer, RINGS[ring] + 16 * index, struct.pack("<QIHH", *part, index + 1))
    publish(peer, ring, [0])


def disk_request(peer: Peer, target: int, size: int) -> list[tuple[int, int, int]]:
    """Return the descriptors of a read, a write or another request of the disk."""
    kind = peer.source.pick((0, 0, 1, 4, 8, 77))
    sector = peer.number(0, 8, DISK_BYTES // 512 - 1)
    direction = WRITE if kind in (0, 8) else 0
    put(peer, HEADER, struct.pack("<IIQ", kind, 0, sector))
    return [(HEADER, 16, NEXT), (target, size, direction | NEXT), (STATUS, 1, WRITE)]


def hostile_request(peer: Peer) -> None:
    """Make random descriptors available, with a head that may not exist."""
    ring = peer.source.integer(0, 1)
    count = peer.source.integer(1, QUEUE_SIZE)
    if peer.packed:
        publish_packed(peer, ring, [fields(peer, 3) for _ in range(count)])
        return
    for index in range(count):
        put(peer, RINGS[ring] + 16 * index, descriptor(peer, QUEUE_SIZE))
    if peer.source.integer(0, 1):
        entries = peer.source.integer(1, 12)
        table = b"".join(descriptor(peer, entries) for _ in range(entries))
        put(peer, TABLE, table)
        indirect = struct.pack("<QIHH", TABLE, peer.number(len(table)) & 0xFFFFFFFF, INDIRECT, 0)
        put(peer, RINGS[ring], indirect)
    heads = [peer.source.pick((0, 0, 1, QUEUE_SIZE - 1, QUEUE_SIZE, 0xFFFF)) for _ in range(2)]
    publish(peer, ring, heads)


def publish_packed(peer: Peer, ring: int, chain: Sequence[tuple[int, int, int, int]]) -> None:
    """Make a packed ring's descriptors (address, length, flags, ID) available, and kick."""
    for address, length, flags, buffer_id in chain:
        index, second_round = peer.position(ring)
        flags = flags & ~(AVAIL | USED) | (USED if second_round else AVAIL)
        entry = struct.pack("<QIHH", address, length, buffer_id, flags)
        put(peer, RINGS[ring] + 16 * index, entry)
        peer.next_available[ring] = (peer.next_available[ring] + 1) % (2 * QUEUE_SIZE)
    event = struct.pack("<HH", peer.source.integer(0, 0xFFFF), peer.source.pick((0, 0, 1, 2, 3)))
    put(peer, RINGS[ring] + 16 * QUEUE_SIZE, event)
    os.eventfd_write(peer.events[ring], 1)


def publish(peer: Peer, ring: int, heads: Sequence[int]) -> None:
    """Make the requests `heads` available, and kick."""
    available = RINGS[ring] + 16 * QUEUE_SIZE
    for head in heads:
        place = available + 4 + 2 * (peer.next_available[ring] % QUEUE_SIZE)
        put(peer, place, struct.pack("<H", head))
        peer.next_available[ring] = (peer.next_available[ring] + 1) & 0xFFFF
    put(peer, available, struct.pack("<HH", peer.source.pick((0, 0, 1)), peer.next_available[ring]))
    put(peer, available + 4 + 2 * QUEUE_SIZE, struct.pack("<H", peer.source.integer(0, 0xFFFF)))
    os.eventfd_write(peer.events[ring], 1)


def jump(peer: Peer) -> None:
    """Set the available index to any value."""
    ring = peer.source.integer(0, 1)
    peer.next_available[ring] = peer.source.integer(0, 0xFFFF)
    if peer.packed:
        publish_packed(peer, ring, [])
    else:
        publish(peer, ring, [])


def scribble(peer: Peer) -> None:
    """Write random bytes into the rings."""
    place = peer.source.pick((*RINGS, RINGS[0] + PAGE, TABLE))
    put(peer, place + peer.source.integer(0, 512), peer.source.blob(64))


def fill_the_call(peer: Peer) -> None:
    """Fill the interrupt eventfd's counter, so that a write to it may block."""
    os.set_blocking(peer.events[2], False)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(peer.events[2], (1 << 64) - 2)
    for event in peer.events:
        os.set_blocking(event, bool(peer.source.integer(0, 1)))


def sync_log(peer: Peer) -> None:
    """Clear the log, as QEMU does when it syncs."""
    peer.log.write(LOG_OFFSET, bytes(peer.log_bytes))
