"""Decoding of a front end's vhost-user messages, and encoding of the answers.

The functions are pure functions over bytes. A message that breaks the specification raises a
`ProtocolError` that names the message.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from ..errors import ProtocolError

MAX_PAYLOAD_BYTES: Final = 4096
"""Far above every supported message; a message that claims more is refused unread."""
MAX_FILE_DESCRIPTORS: Final = 8
"""VHOST_MEMORY_BASELINE_NREGIONS: the most that one message carries."""

_VERSION: Final = 1
_VERSION_MASK: Final = 3
_FLAG_REPLY: Final = 1 << 2
_FLAG_NEED_REPLY: Final = 1 << 3
_NO_FILE_DESCRIPTOR: Final = 1 << 8
_HEADER: Final = struct.Struct("<III")
_INFLIGHT: Final = "<QQHH4x"  # a C structure, with its padding
_IOTLB: Final = "<QQQBB6x"  # struct vhost_iotlb_msg: iova, size, uaddr, perm, type
_BACKEND_IOTLB_MSG: Final = 1  # the only back-end message in use ("Back-end message types")

HEADER_BYTES: Final = _HEADER.size
BACKEND_REPLY_BYTES: Final = HEADER_BYTES + 8
"""Size of the front end's answer to a back-end message."""


class Request(IntEnum):
    """Front-end messages by number ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34


class ProtocolFeature(IntFlag):
    """The protocol features that the back end offers ("Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13


class IotlbEvent(IntEnum):
    """The type of an IOTLB message (VHOST_IOTLB_MISS, …)."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class Message(NamedTuple):
    """One message from a front end; the receiver must close its file descriptors."""

    request: Request
    payload: bytes
    fds: tuple[int, ...]
    needs_reply: bool


class Header(NamedTuple):
    """A message's first 12 bytes, checked."""

    request: Request
    needs_reply: bool
    payload_bytes: int


class VringState(NamedTuple):
    """A ring's number and a value: the ring's size, its base, or whether it is enabled."""

    ring: int
    value: int


class VringAddress(NamedTuple):
    """The addresses of a ring: HVAs, except `log`, the GPA at which used-ring writes are logged.

    Behind an IOMMU all of them are IOVAs, and `log` is the IOVA of the used ring: QEMU sends that
    (vhost_virtqueue_set_addr), and vhost in the kernel expects it.
    """

    ring: int
    logged: bool
    descriptors: int
    used: int
    available: int
    log: int


class MemoryRegion(NamedTuple):
    """One region of a memory table, in bytes."""

    gpa: int
    length: int
    hva: int
    file_offset: int


class LogBase(NamedTuple):
    """Size and offset in bytes of the dirty log in the file that comes with the message."""

    size: int
    offset: int


class InflightFile(NamedTuple):
    """The in-flight region in its file: `size` and `offset` in bytes, and the rings it is for."""

    size: int
    offset: int
    queues: int
    queue_size: int


class ConfigAccess(NamedTuple):
    """A part of the configuration space; in a GET_CONFIG `content` is only a placeholder."""

    offset: int
    flags: int
    content: bytes


class IotlbChange(NamedTuple):
    """A mapping that was added or removed, in bytes; only an added one has `hva` and `access`.

    `access` has permission bits. A `size` of 2**64, the whole address space, does not fit into the
    message, which has 0 instead.
    """

    event: IotlbEvent
    iova: int
    size: int
    hva: int
    access: int


class VringFile(NamedTuple):
    """The ring of a kick or call file descriptor, and whether the message carries one."""

    ring: int
    has_fd: bool


def decode_header(header: bytes) -> Header:
    """Decode and check the 12 bytes of a header.

    Raises:
        ProtocolError: the request is unknown, the version is not supported, the message is a reply,
            or the payload is too long.
    """
    number, flags, payload_bytes = _HEADER.unpack(header)
    try:
        request = Request(number)
    except ValueError:
        raise ProtocolError(f"vhost-user request {number} was not offered") from None
    if flags & _VERSION_MASK != _VERSION:
        raise ProtocolError(
            f"{request.name}: expected version {_VERSION}, got {flags & _VERSION_MASK}"
        )
    if flags & _FLAG_REPLY:
        raise ProtocolError(f"{request.name}: expected a request, got a reply")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"{request.name}: expected a payload of at most {MAX_PAYLOAD_BYTES} bytes, got "
            f"{payload_bytes}"
        )
    return Header(request, bool(flags & _FLAG_NEED_REPLY), payload_bytes)


def encode_reply(request: Request, payload: bytes) -> bytes:
    """Return the complete answer to `request`."""
    return _HEADER.pack(request, _VERSION | _FLAG_REPLY, len(payload)) + payload


def encode_request(request: Request, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """Return a front end's complete message."""
    flags = _VERSION | (_FLAG_NEED_REPLY if need_reply else 0)
    return _HEADER.pack(request, flags, len(payload)) + payload


def _unpack(message: Message, layout: str) -> tuple[int, ...]:
    if len(message.payload) != struct.calcsize(layout):
        raise ProtocolError(
            f"{message.request.name}: expected a payload of {struct.calcsize(layout)} bytes, got "
            f"{len(message.payload)}"
        )
    return struct.unpack(layout, message.payload)


def encode_u64(value: int) -> bytes:
    """Return the payload of a message that carries one 64-bit number."""
    return struct.pack("<Q", value)


def decode_u64(message: Message) -> int:
    """Return the number that the message carries."""
    return _unpack(message, "<Q")[0]


def encode_vring_state(state: VringState) -> bytes:
    """Return the payload of a message that carries a ring's number and a value."""
    return struct.pack("<II", *state)


def decode_vring_state(message: Message) -> VringState:
    """Return the ring and the value that the message carries."""
    return VringState(*_unpack(message, "<II"))


def decode_vring_file(message: Message) -> VringFile:
    """Return the ring that the message's file descriptor is for.

    Raises:
        ProtocolError: the number of file descriptors does not match the message.
    """
    value = decode_u64(message)
    has_fd = not value & _NO_FILE_DESCRIPTOR
    if len(message.fds) != has_fd:
        raise ProtocolError(
            f"{message.request.name}: got {len(message.fds)} file descriptors, "
            f"expected {int(has_fd)}"
        )
    return VringFile(value & 0xFF, has_fd)


def decode_vring_address(message: Message) -> VringAddress:
    """Return the addresses of the ring."""
    ring, flags, descriptors, used, available, log = _unpack(message, "<IIQQQQ")
    return VringAddress(ring, bool(flags & 1), descriptors, used, available, log)


def decode_memory_table(message: Message) -> list[MemoryRegion]:
    """Return the regions of SET_MEM_TABLE, one for each file descriptor.

    Raises:
        ProtocolError: the numbers of regions, bytes and file descriptors do not agree.
    """
    if len(message.payload) < 8:
        raise ProtocolError(
            f"SET_MEM_TABLE: expected a payload of at least 8 bytes, got {len(message.payload)}"
        )
    count = int.from_bytes(message.payload[:4], "little")
    regions = message.payload[8 : 8 + 32 * count]
    if not 0 < count <= MAX_FILE_DESCRIPTORS or len(regions) != 32 * count:
        raise ProtocolError(
            f"SET_MEM_TABLE: {count} regions in {len(message.payload)} bytes of payload; expected "
            f"1 to {MAX_FILE_DESCRIPTORS} regions of 32 bytes each"
        )
    if len(message.fds) != count:
        raise ProtocolError(
            f"SET_MEM_TABLE: got {len(message.fds)} file descriptors for {count} regions, expected "
            "one for each"
        )
    decoded = []
    for gpa, length, hva, file_offset in struct.iter_unpack("<QQQQ", regions):
        decoded.append(MemoryRegion(gpa, length, hva, file_offset))
    return decoded


def encode_memory_table(regions: Sequence[MemoryRegion]) -> bytes:
    """Return the payload of a message that carries a memory table."""
    table = b"".join(struct.pack("<QQQQ", *region) for region in regions)
    return struct.pack("<I4x", len(regions)) + table


def decode_log_base(message: Message) -> LogBase:
    """Return the place of the dirty log in the message's file.

    Raises:
        ProtocolError: the message does not carry exactly one file descriptor.
    """
    log = LogBase(*_unpack(message, "<QQ"))
    if len(message.fds) != 1:
        raise ProtocolError(f"SET_LOG_BASE: got {len(message.fds)} file descriptors, expected 1")
    return log


def decode_inflight(message: Message) -> InflightFile:
    """Return the description of the file for requests in flight.

    Raises:
        ProtocolError: a SET_INFLIGHT_FD does not carry exactly one file descriptor.
    """
    file = InflightFile(*_unpack(message, _INFLIGHT))
    if message.request == Request.SET_INFLIGHT_FD and len(message.fds) != 1:
        raise ProtocolError(f"SET_INFLIGHT_FD: got {len(message.fds)} file descriptors, expected 1")
    return file


def encode_inflight(file: InflightFile) -> bytes:
    """Return the payload of a message that describes `file`."""
    return struct.pack(_INFLIGHT, *file)


def decode_iotlb(message: Message) -> IotlbChange:
    """Return the mapping that was added or removed.

    Raises:
        ProtocolError: the message is neither an update nor an invalidation, or its range is empty
            or leaves the 64-bit address space.
    """
    iova, size, hva, access, event = _unpack(message, _IOTLB)
    if event not in (IotlbEvent.UPDATE, IotlbEvent.INVALIDATE):
        raise ProtocolError(f"IOTLB_MSG: a front end must not send type {event}")
    if event == IotlbEvent.INVALIDATE and iova == size == 0:
        size = 1 << 64
    if size == 0 or iova + size > 1 << 64:
        raise ProtocolError(
            f"IOTLB_MSG: IOVA {iova:#x} + {size:#x} is empty, or leaves the 64-bit address space"
        )
    if event == IotlbEvent.UPDATE and access not in (1, 2, 3):
        raise ProtocolError(f"IOTLB_MSG: expected permissions 0x1 to 0x3, got {access:#x}")
    return IotlbChange(IotlbEvent(event), iova, size, hva, access)


def encode_iotlb(change: IotlbChange) -> bytes:
    """Return the payload of a message that carries `change`."""
    event, iova, size, hva, access = change
    return struct.pack(_IOTLB, iova, size % (1 << 64), hva, access, event)


def encode_miss(iova: int, access: int) -> bytes:
    """Return the back-end message that asks for a mapping and requests an answer."""
    payload = struct.pack(_IOTLB, iova, 0, 0, access, IotlbEvent.MISS)
    flags = _VERSION | _FLAG_NEED_REPLY
    return _HEADER.pack(_BACKEND_IOTLB_MSG, flags, len(payload)) + payload


def decode_backend_reply(reply: bytes) -> bool:
    """Return whether the front end reports success, from `BACKEND_REPLY_BYTES` of answer.

    Raises:
        ProtocolError: `reply` is not an answer to an IOTLB message.
    """
    number, flags, payload_bytes = _HEADER.unpack_from(reply)
    if (number, flags & (_VERSION_MASK | _FLAG_REPLY), payload_bytes) != (
        _BACKEND_IOTLB_MSG,
        _VERSION | _FLAG_REPLY,
        8,
    ):
        raise ProtocolError(
            f"back-end channel: expected an answer to an IOTLB message, got request {number} with "
            f"flags {flags:#x} and {payload_bytes} bytes"
        )
    return not int.from_bytes(reply[HEADER_BYTES:], "little")


def decode_config(message: Message) -> ConfigAccess:
    """Return the part of the configuration space that is read or written."""
    if len(message.payload) < 12:
        raise ProtocolError(
            f"{message.request.name}: expected a payload of at least 12 bytes, got "
            f"{len(message.payload)}"
        )
    offset, size, flags = struct.unpack_from("<III", message.payload)
    content = message.payload[12:]
    if size != len(content):
        raise ProtocolError(
            f"{message.request.name}: the message declares {size} bytes of configuration, but "
            f"carries {len(content)}"
        )
    return ConfigAccess(offset, flags, content)


def encode_config(access: ConfigAccess) -> bytes:
    """Return the payload of the answer to GET_CONFIG."""
    return struct.pack("<III", access.offset, len(access.content), access.flags) + access.content
