"""Actions of a front end that QEMU never takes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import Final

from dmaproof.vhost_user.features import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    F_RING_EVENT_IDX,
    PROTOCOL_FEATURES,
)
from dmaproof.vhost_user.inflight import region_bytes
from dmaproof.vhost_user.messages import Request, encode_request, encode_u64
from qmp_tools.testbed.ring_driver import HVA_BASE, PAGE
from support.hostile.files import KINDS
from support.hostile.guest import fields, honest_request
from support.hostile.layout import (
    DATA,
    FEATURES,
    HIGH_BYTES,
    HIGH_OFFSET,
    LOG_OFFSET,
    LOW,
    QUEUE_SIZE,
    RINGS,
)
from support.hostile.peer import Peer

_STATES: Final = (
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
)

_LIKELY_STATES: Final = {
    Request.SET_VRING_NUM: (QUEUE_SIZE, 0, 1, 2, 32768, 65536, 3),
    Request.SET_VRING_BASE: (0, 0x8000_8000, 5, 0xFFFF, 0x10000),
    Request.GET_VRING_BASE: (0,),
    Request.SET_VRING_ENABLE: (1, 0, 2),
}


def some_fds(peer: Peer, most: int) -> list[int]:
    """Return file descriptors of unusual kinds, closed with the peer."""
    return [some_fd(peer) for _ in range(peer.source.integer(0, most))]


def some_fd(peer: Peer) -> int:
    """Return a file descriptor of an unusual or a correct kind."""
    kind = peer.source.pick(KINDS)
    opened = kind(peer)
    peer.cleanup.callback(os.close, opened)
    return opened


def any_message(peer: Peer) -> None:
    """Send a random header and payload with random file descriptors."""
    number = peer.source.pick((*Request, 0, 4, 19, 23, 31, 999, 0xFFFFFFFF))
    flags = peer.source.pick((1, 1, 1, 9, 0, 2, 5, 0xFFFFFFFF))
    payload = peer.source.blob(300)
    size = peer.source.pick((len(payload), len(payload), len(payload) + 1, 4097, 0, 0xFFFFFFFF))
    fds = some_fds(peer, 10)
    for fd in fds:
        _allow_writes(peer, fd)
    peer.send_raw(struct.pack("<III", number, flags, size) + payload, fds)


def _allow_writes(peer: Peer, fd: int) -> None:
    """Allow the server to write anywhere into a file that a random message carried."""
    for shared in (peer.ram, peer.log, peer.inflight):
        if os.path.sameopenfile(fd, shared.fd):
            shared.writable[:] = True
            peer.logged_gpas.append((0, 1 << 64))


def part_of_a_message(peer: Peer) -> None:
    """Send the beginning of a message, and perhaps the rest."""
    data = encode_request(peer.source.pick(tuple(Request)), encode_u64(peer.number(0, 1, FEATURES)))
    cut = peer.source.integer(1, len(data) - 1)
    peer.send_raw(data[:cut], some_fds(peer, 2))
    peer.server.turn(0)
    if peer.source.integer(0, 1):
        peer.send_raw(data[cut:], some_fds(peer, 2))


def set_features(peer: Peer) -> None:
    """Set features in any combination."""
    bit = 1 << peer.source.integer(0, 63)
    features = peer.features | peer.source.pick((0, F_LOG_ALL, F_RING_EVENT_IDX))
    features = peer.source.pick((features, features ^ bit, features & ~F_PROTOCOL_FEATURES))
    peer.send(Request.SET_FEATURES, encode_u64(features))
    if peer.rarely():
        features = peer.source.pick((peer.protocol_features, 0, PROTOCOL_FEATURES | bit))
        peer.send(Request.SET_PROTOCOL_FEATURES, encode_u64(features))


def memory_table(peer: Peer) -> None:
    """Send a memory table whose slots may overlap, or leave the address space or the file."""
    places = []
    for honest in (LOW, (peer.high, HIGH_BYTES, HIGH_OFFSET))[: peer.source.integer(0, 2)]:
        gpa = peer.number(honest[0], peer.high, 4 * PAGE, 28 * PAGE, (1 << 64) - PAGE)
        length = peer.number(honest[1], PAGE, 2 * PAGE, 0, 1 << 40)
        offset = peer.number(honest[2], 0, 100, (1 << 63) - 1)
        places.append((gpa, length, offset))
    peer.set_memory(*places)


def memory_of_odd_files(peer: Peer) -> None:
    """Send a memory table of files that are not RAM or are huge."""
    count = peer.source.integer(1, 3)
    regions = b""
    for index in range(count):
        gpa = peer.number(index << 32, index * 32 * PAGE)
        regions += struct.pack(
            "<QQQQ", gpa, peer.number(PAGE, 1 << 30, 1 << 46), HVA_BASE + index, peer.number(0)
        )
    fds = [some_fd(peer) for _ in range(peer.source.pick((count, count, count, 0, 8, 9)))]
    for fd in fds:
        _allow_writes(peer, fd)
    peer.send(Request.SET_MEM_TABLE, struct.pack("<II", count, 0) + regions, fds)


def odd_log(peer: Peer) -> None:
    """Set a log of a wrong size or offset, or in an unsuitable file."""
    size = peer.number(peer.log_bytes, peer.log_bytes - 8, 1 << 20, 8)
    offset = peer.number(LOG_OFFSET, 0, 8)
    fd = None if peer.source.integer(0, 1) else some_fd(peer)
    if fd is not None:
        _allow_writes(peer, fd)
    peer.set_log(size, offset, fd)


def ring_state(peer: Peer) -> None:
    """Send a random state message for a ring that may not exist."""
    request = peer.source.pick(_STATES)
    index = ring(peer)
    value = peer.number(*_LIKELY_STATES[request]) & 0xFFFFFFFF
    peer.send(request, struct.pack("<II", index, value))


def ring_address(peer: Peer) -> None:
    """Set ring addresses outside RAM, or of parts that overlap."""
    index = ring(peer)
    base = RINGS[index % 2]
    odd = (base, base + PAGE, base + 16 * QUEUE_SIZE, LOW[1] - 64, peer.high)
    honest = (base, base + PAGE, base + 16 * QUEUE_SIZE)
    places = [HVA_BASE + peer.number(place, *odd) for place in honest]
    log = peer.number(base + PAGE, base)
    flags = peer.source.pick((0, 0, 1, 0xFFFFFFFF))
    payload = struct.pack("<IIQQQQ", index, flags, *(p % (1 << 64) for p in places), log)
    peer.send(Request.SET_VRING_ADDR, payload)


def event_fds(peer: Peer) -> None:
    """Send a kick, call or error file descriptor of an unusual kind, or none."""
    request = peer.source.pick(
        (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
    )
    value = peer.source.pick((0, 0, 1, 1, 2, 255, 256, 257, (1 << 64) - 1))
    count = peer.source.pick((0, 1, 1, 1, 2))
    peer.send(request, encode_u64(value), [some_fd(peer) for _ in range(count)])


def any_mapping(peer: Peer) -> None:
    """Add or remove a mapping, a valid or a random one."""
    event = peer.source.pick((2, 2, 2, 3, 3, 1, 4, 0, 255))
    iova = peer.number(DATA, *RINGS, HVA_BASE + RINGS[0], 1 << 47, 0)
    size = peer.number(PAGE, 4 * PAGE, 0, 1 << 30, 1 << 47)
    hva = HVA_BASE + peer.number(DATA, RINGS[0], peer.high)
    peer.send_iotlb(event, iova, size, hva, peer.source.pick((3, 3, 1, 2, 0, 4)))


def everything_unmapped(peer: Peer) -> None:
    """Remove all mappings, as when the guest's IOMMU is flushed."""
    peer.send_iotlb(3, 0, 0, 0, 0)


def odd_channel(peer: Peer) -> None:
    """Close the back-end channel, or set one of an unusual kind."""
    if peer.source.integer(0, 1) and peer.channel is not None:
        peer.channel.close()
        return
    fds = some_fds(peer, 2)
    for fd in fds:
        _allow_writes(peer, fd)
    peer.send(Request.SET_BACKEND_REQ_FD, b"", fds)


def ring(peer: Peer) -> int:
    """Return a ring number that may not exist."""
    return peer.source.pick((*[0, 1] * 6, 2, 255, 0xFFFFFFFF))


def configuration(peer: Peer) -> None:
    """Read or write the configuration space."""
    size = peer.source.pick((0, 8, 60, 256))
    offset = peer.number(0, 8, 256) & 0xFFFFFFFF
    claimed = peer.source.pick((size, size, size + 1))
    payload = struct.pack("<III", offset, claimed, 0) + bytes(size)
    peer.send(peer.source.pick((Request.GET_CONFIG, Request.SET_CONFIG)), payload)


def set_inflight(peer: Peer) -> None:
    """Set an in-flight file: unused, of another process, or with random content."""
    if peer.rarely():
        asked = struct.pack("<QQHH4x", 0, 0, peer.number(2) & 0xFFFF, peer.number(8) & 0xFFFF)
        peer.send(Request.GET_INFLIGHT_FD, asked)
    spoil_inflight(peer)
    region = region_bytes(QUEUE_SIZE)
    size, queues = peer.number(2 * region, region), peer.number(2, 1) & 0xFFFF
    offset, queue_size = peer.number(0, 8, 64), peer.number(QUEUE_SIZE, 1, 4) & 0xFFFF
    peer.inflight.share(offset, size)
    payload = struct.pack("<QQHH4x", size, offset, queues, queue_size)
    fds = some_fds(peer, 2) if peer.rarely() else [peer.inflight.fd]
    for fd in fds:
        _allow_writes(peer, fd)
    peer.send(Request.SET_INFLIGHT_FD, payload, fds)


def spoil_inflight(peer: Peer) -> None:
    """Write into the in-flight file."""
    ring = peer.source.integer(0, 1) * region_bytes(QUEUE_SIZE)
    if peer.source.integer(0, 1):
        header = [peer.number(1, 0), peer.number(QUEUE_SIZE)]
        header += [peer.number(0, 1, QUEUE_SIZE - 1, QUEUE_SIZE) for _ in range(4)]
        words = struct.pack("<6H", *(word & 0xFFFF for word in header))
        peer.inflight.write(ring + 8, words + peer.source.blob(2))
    for _ in range(peer.source.integer(0, 4)):
        of_packed = peer.source.integer(0, 1)
        number = peer.source.integer(0, QUEUE_SIZE - 1)
        place = 32 + 32 * number if of_packed else 16 + 16 * number
        links = (peer.number(0, 1, 7, 8) & 0xFFFF for _ in range(3))
        counter = peer.number(0, (1 << 64) - 1)
        entry = struct.pack("<BxHHHQ", peer.source.integer(0, 1), *links, counter)
        peer.inflight.write(ring + place, entry)
        if of_packed:
            address, length, flags, buffer_id = fields(peer, QUEUE_SIZE)
            described = struct.pack("<HHIQ", buffer_id, flags, length, address)
            peer.inflight.write(ring + place + 16, described)


def truncate_a_file(peer: Peer) -> None:
    """Truncate a file while it is mapped, and perhaps restore its size."""
    shared = peer.source.pick((peer.ram, peer.ram, peer.log, peer.inflight))
    whole = len(shared.expected)
    shared.resize(peer.source.integer(0, whole))
    if peer.source.integer(0, 1):
        honest_request(peer)
        peer.settle()
    if peer.source.integer(0, 1):
        shared.resize(whole)


def seal(peer: Peer) -> None:
    """Seal the RAM file against shrinking and growing."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    fcntl.fcntl(peer.ram.fd, fcntl.F_ADD_SEALS, seals)


def disconnect(peer: Peer) -> None:
    """Disconnect, perhaps in the middle of a message."""
    if peer.source.integer(0, 1):
        peer.send_raw(
            struct.pack("<III", Request.SET_MEM_TABLE, 1, 40)[: peer.source.integer(1, 12)]
        )
    peer.socket.close()


def flood(peer: Peer) -> None:
    """Send many requests without reading the answers."""
    data = encode_request(Request.GET_CONFIG, struct.pack("<III", 0, 256, 0) + bytes(256))
    with contextlib.suppress(OSError):
        for _ in range(peer.source.integer(1, 600)):
            peer.socket.send(data)
