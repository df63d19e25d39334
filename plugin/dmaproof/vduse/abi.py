"""VDUSE's requests and messages: include/uapi/linux/vduse.h of Linux 7.3, which is stable ABI."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

_TYPE: Final = 0x81
_WRITE, _READ = 1, 2  # _IOC_WRITE and _IOC_READ: the kernel reads, or writes, the argument


def _request(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _TYPE << 8 | number


NAME_BYTES: Final = 256
CONFIG: Final = Struct(f"<{NAME_BYTES}sIIQIIII44xI")
"""vduse_dev_config: name, vendor, device type, features, virtqueues, their alignment, groups and
address spaces (both 0 before version 1), and the size of the configuration space that follows."""
U64: Final = Struct("<Q")
IOTLB_ENTRY: Final = Struct("<QQQB7x")
"""vduse_iotlb_entry: offset in the file, first and last IOVA, access rights."""
QUEUE_CONFIG: Final = Struct("<IHHI20x")
"""vduse_vq_config: index, largest size, reserved, group."""
QUEUE_INFO: Final = Struct("<IIQQQH6xB7x")
"""vduse_vq_info: index, size, IOVAs of descriptors, driver's and device's area, position, ready."""
QUEUE_EVENT: Final = Struct("<Ii")
"""vduse_vq_eventfd: index, eventfd."""
U32: Final = Struct("<I")

SET_API_VERSION: Final = _request(_WRITE, 0x01, U64.size)
CREATE_DEV: Final = _request(_WRITE, 0x02, CONFIG.size)
DESTROY_DEV: Final = _request(_WRITE, 0x03, NAME_BYTES)
SET_FEATURES: Final = _request(_WRITE, 0x05, U64.size)
IOTLB_GET_FD: Final = _request(_READ | _WRITE, 0x10, IOTLB_ENTRY.size)
DEV_GET_FEATURES: Final = _request(_READ, 0x11, U64.size)
VQ_SETUP: Final = _request(_WRITE, 0x14, QUEUE_CONFIG.size)
VQ_GET_INFO: Final = _request(_READ | _WRITE, 0x15, QUEUE_INFO.size)
VQ_SETUP_KICKFD: Final = _request(_WRITE, 0x16, QUEUE_EVENT.size)
VQ_INJECT_IRQ: Final = _request(_WRITE, 0x17, U32.size)

F_SUSPEND: Final = 1 << 1
"""The device can be suspended: it takes no further requests, and keeps its state."""


class MessageType(IntEnum):
    """The messages that the kernel sends (vduse_req_type)."""

    GET_VQ_STATE = 0
    SET_STATUS = 1
    UPDATE_IOTLB = 2
    SUSPEND = 5


MESSAGE: Final = Struct("<II16x128s")
"""vduse_dev_request: type, number, content."""
ANSWER: Final = Struct("<II16x128s")
"""vduse_dev_response: number, result, content."""
OK, FAILED = 0, 1
QUEUE_STATE: Final = Struct("<IH")
"""vduse_vq_state of a split ring: index, position."""
