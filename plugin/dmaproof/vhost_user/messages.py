"""The vhost-user messages as bytes: decoding what a front end sends, encoding what it is answered.

Pure functions over bytes. What does not fit the specification is a `ProtocolError` that names the
message.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from ..errors import ProtocolError

MAX_PAYLOAD_BYTES: Final = 4096
"""Far above every message that is understood here; what claims more is refused unread."""
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
_BACKEND_IOTLB_MSG: Final = 1  # the only back-end message here ("Back-end message types")

HEADER_BYTES: Final = _HEADER.size
BACKEND_REPLY_BYTES: Final = HEADER_BYTES + 8
"""The front end's answer to a back end's message."""


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
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34


class ProtocolFeature(IntFlag):
    """The protocol features that the back end offers ("Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13


class IotlbEvent(IntEnum):
    """What an IOTLB message tells (VHOST_IOTLB_MISS, …)."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class Message(NamedTuple):
    """One message from a front end; its file descriptors are the receiver's to close."""

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
    """A ring's number, and a value: its size, base or whether it is enabled."""

    ring: int
    value: int


class VringAddress(NamedTuple):
    """Where a ring stands: HVAs, but for `log`, the GPA at which used-ring writes are logged.

    Behind an IOMMU all of them are IOVAs, and `log` is that of the used ring: QEMU sends it
    (vhost_virtqueue_set_addr), and vhost in the kernel takes it for nothing else.
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
    """Size and offset in bytes of the dirty log in the file that came with the message."""

    size: int
    offset: int


class InflightFile(NamedTuple):
    """Where requests in flight are noted: `size` and `offset` in bytes, and for which rings."""

    size: int
    offset: int
    queues: int
    queue_size: int


class ConfigAccess(NamedTuple):
    """A piece of the configuration space; `content` is empty space in a GET_CONFIG."""

    offset: int
    flags: int
    content: bytes


class IotlbChange(NamedTuple):
    """A mapping that has come or gone, in bytes; `hva` and `access` (bits) only of one that came.

    A `size` of 2**64, the whole address space, does not fit into the message: it is 0 there.
    """

    event: IotlbEvent
    iova: int
    size: int
    hva: int
    access: int


class VringFile(NamedTuple):
    """Which ring a kick or call file descriptor is for, and whether one came along."""

    ring: int
    has_fd: bool


def decode_header(header: bytes) -> Header:
    """Check the 12 bytes of a header.

    Raises:
        ProtocolError: an unknown request, another version, a reply, or a payload that is too long.
    """
    number, flags, payload_bytes = _HEADER.unpack(header)
    try:
        request = Request(number)
    except ValueError:
        raise ProtocolError(f"vhost-user request {number} is not one that was offered") from None
    if flags & _VERSION_MASK != _VERSION:
        raise ProtocolError(f"{request.name}: version {flags & _VERSION_MASK}, not {_VERSION}")
    if flags & _FLAG_REPLY:
        raise ProtocolError(f"{request.name}: a reply where a request was due")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"{request.name}: payload of {payload_bytes} bytes, more than {MAX_PAYLOAD_BYTES}"
        )
    return Header(request, bool(flags & _FLAG_NEED_REPLY), payload_bytes)


def encode_reply(request: Request, payload: bytes) -> bytes:
    """The whole answer to `request`."""
    return _HEADER.pack(request, _VERSION | _FLAG_REPLY, len(payload)) + payload


def encode_request(request: Request, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """The whole of a front end's message."""
    flags = _VERSION | (_FLAG_NEED_REPLY if need_reply else 0)
    return _HEADER.pack(request, flags, len(payload)) + payload


def _unpack(message: Message, layout: str) -> tuple[int, ...]:
    if len(message.payload) != struct.calcsize(layout):
        raise ProtocolError(
            f"{message.request.name}: payload of {len(message.payload)} bytes, "
            f"not {struct.calcsize(layout)}"
        )
    return struct.unpack(layout, message.payload)


def encode_u64(value: int) -> bytes:
    """The payload of the messages that carry one 64-bit number."""
    return struct.pack("<Q", value)


def decode_u64(message: Message) -> int:
    """The number that the message carries."""
    return _unpack(message, "<Q")[0]


def encode_vring_state(state: VringState) -> bytes:
    """The payload of the messages that carry a ring's number and a value."""
    return struct.pack("<II", *state)


def decode_vring_state(message: Message) -> VringState:
    """The ring and the value."""
    return VringState(*_unpack(message, "<II"))


def decode_vring_file(message: Message) -> VringFile:
    """The ring that the message's file descriptor is for.

    Raises:
        ProtocolError: the number of file descriptors is not what the message says.
    """
    value = decode_u64(message)
    has_fd = not value & _NO_FILE_DESCRIPTOR
    if len(message.fds) != has_fd:
        raise ProtocolError(
            f"{message.request.name}: {len(message.fds)} file descriptors, not {int(has_fd)}"
        )
    return VringFile(value & 0xFF, has_fd)


def decode_vring_address(message: Message) -> VringAddress:
    """Where the ring stands."""
    ring, flags, descriptors, used, available, log = _unpack(message, "<IIQQQQ")
    return VringAddress(ring, bool(flags & 1), descriptors, used, available, log)


def decode_memory_table(message: Message) -> list[MemoryRegion]:
    """The regions of SET_MEM_TABLE, one for each file descriptor.

    Raises:
        ProtocolError: the counts of regions, bytes and file descriptors do not agree.
    """
    if len(message.payload) < 8:
        raise ProtocolError(f"SET_MEM_TABLE: payload of {len(message.payload)} bytes")
    count = int.from_bytes(message.payload[:4], "little")
    regions = message.payload[8 : 8 + 32 * count]
    if not 0 < count <= MAX_FILE_DESCRIPTORS or len(regions) != 32 * count:
        raise ProtocolError(
            f"SET_MEM_TABLE: {count} regions in {len(message.payload)} bytes of payload; 1 to "
            f"{MAX_FILE_DESCRIPTORS} are possible, of 32 bytes each"
        )
    if len(message.fds) != count:
        raise ProtocolError(f"SET_MEM_TABLE: {len(message.fds)} files for {count} regions")
    decoded = []
    for gpa, length, hva, file_offset in struct.iter_unpack("<QQQQ", regions):
        decoded.append(MemoryRegion(gpa, length, hva, file_offset))
    return decoded


def decode_log_base(message: Message) -> LogBase:
    """The dirty log's place in the file that came along.

    Raises:
        ProtocolError: not exactly one file came along.
    """
    log = LogBase(*_unpack(message, "<QQ"))
    if len(message.fds) != 1:
        raise ProtocolError(f"SET_LOG_BASE: {len(message.fds)} file descriptors, not 1")
    return log


def decode_inflight(message: Message) -> InflightFile:
    """What is said of the file for requests in flight.

    Raises:
        ProtocolError: SET_INFLIGHT_FD did not bring exactly one file.
    """
    file = InflightFile(*_unpack(message, _INFLIGHT))
    if message.request == Request.SET_INFLIGHT_FD and len(message.fds) != 1:
        raise ProtocolError(f"SET_INFLIGHT_FD: {len(message.fds)} file descriptors, not 1")
    return file


def encode_inflight(file: InflightFile) -> bytes:
    """The payload of the messages that carry `file`."""
    return struct.pack(_INFLIGHT, *file)


def decode_iotlb(message: Message) -> IotlbChange:
    """The mapping that has come or gone.

    Raises:
        ProtocolError: it is neither of the two, empty, or leaves the 64-bit space.
    """
    iova, size, hva, access, event = _unpack(message, _IOTLB)
    if event not in (IotlbEvent.UPDATE, IotlbEvent.INVALIDATE):
        raise ProtocolError(f"IOTLB_MSG: type {event} is not a front end's to send")
    if event == IotlbEvent.INVALIDATE and iova == size == 0:
        size = 1 << 64
    if size == 0 or iova + size > 1 << 64:
        raise ProtocolError(
            f"IOTLB_MSG: IOVA {iova:#x} + {size:#x} is empty, or leaves the 64-bit address space"
        )
    if event == IotlbEvent.UPDATE and access not in (1, 2, 3):
        raise ProtocolError(f"IOTLB_MSG: a mapping with permissions {access:#x}")
    return IotlbChange(IotlbEvent(event), iova, size, hva, access)


def encode_iotlb(change: IotlbChange) -> bytes:
    """The payload of the messages that carry `change`."""
    event, iova, size, hva, access = change
    return struct.pack(_IOTLB, iova, size % (1 << 64), hva, access, event)


def encode_miss(iova: int, access: int) -> bytes:
    """The back end's message that asks for a mapping, and for an answer."""
    payload = struct.pack(_IOTLB, iova, 0, 0, access, IotlbEvent.MISS)
    flags = _VERSION | _FLAG_NEED_REPLY
    return _HEADER.pack(_BACKEND_IOTLB_MSG, flags, len(payload)) + payload


def decode_backend_reply(reply: bytes) -> bool:
    """Whether a back end's message could be obeyed, from `BACKEND_REPLY_BYTES`.

    Raises:
        ProtocolError: it is no answer to one that is sent here.
    """
    number, flags, payload_bytes = _HEADER.unpack_from(reply)
    if (number, flags & (_VERSION_MASK | _FLAG_REPLY), payload_bytes) != (
        _BACKEND_IOTLB_MSG,
        _VERSION | _FLAG_REPLY,
        8,
    ):
        raise ProtocolError(
            f"the back-end channel brought request {number} with flags {flags:#x} and "
            f"{payload_bytes} bytes, not the answer that is due"
        )
    return not int.from_bytes(reply[HEADER_BYTES:], "little")


def decode_config(message: Message) -> ConfigAccess:
    """The piece of configuration space that is read or written."""
    if len(message.payload) < 12:
        raise ProtocolError(f"{message.request.name}: payload of {len(message.payload)} bytes")
    offset, size, flags = struct.unpack_from("<III", message.payload)
    content = message.payload[12:]
    if size != len(content):
        raise ProtocolError(
            f"{message.request.name}: says {size} bytes of configuration, brings {len(content)}"
        )
    return ConfigAccess(offset, flags, content)


def encode_config(access: ConfigAccess) -> bytes:
    """The payload of the answer to GET_CONFIG."""
    return struct.pack("<III", access.offset, len(access.content), access.flags) + access.content
