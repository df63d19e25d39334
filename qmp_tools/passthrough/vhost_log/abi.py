"""The ioctls and structures of linux/vhost.h, and the feature bits that the proofs negotiate."""

from __future__ import annotations

import fcntl
import os
import struct
from enum import IntEnum
from typing import Final


class Feature(IntEnum):
    """The numbers of feature bits: virtio 1.2, section 6, and linux/vhost_types.h."""

    SCSI_HOTPLUG = 1
    NET_MERGEABLE = 15
    LOG_ALL = 26
    """VHOST_F_LOG_ALL: the device logs the buffers that it writes."""
    NET_HEADER = 27
    """VHOST_NET_F_VIRTIO_NET_HDR: vhost-net, and not the tap, writes the header."""
    INDIRECT = 28
    EVENT_INDEX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    """The device translates addresses with an IOTLB."""
    IN_ORDER = 35


class Ioctl(IntEnum):
    """The requests; sizes and directions are part of their numbers."""

    GET_FEATURES = 0x8008AF00
    SET_FEATURES = 0x4008AF00
    SET_OWNER = 0xAF01
    SET_MEM_TABLE = 0x4008AF03
    SET_LOG_BASE = 0x4008AF04
    SET_VRING_NUM = 0x4008AF10
    SET_VRING_ADDR = 0x4028AF11
    SET_VRING_BASE = 0x4008AF12
    SET_VRING_KICK = 0x4008AF20
    SET_VRING_CALL = 0x4008AF21
    NET_SET_BACKEND = 0x4008AF30
    SCSI_SET_ENDPOINT = 0x40E8AF40
    SCSI_CLEAR_ENDPOINT = 0x40E8AF41
    VSOCK_SET_GUEST_CID = 0x4008AF60
    VSOCK_SET_RUNNING = 0x4004AF61


U64: Final = struct.Struct("=Q")
STATE: Final = struct.Struct("=II")
"""struct vhost_vring_state, and vhost_vring_file if its number is not negative."""
FILE: Final = struct.Struct("=Ii")
ADDRESSES: Final = struct.Struct("=IIQQQQ")
"""struct vhost_vring_addr: index, flags, descriptors, used, avail, address for the log."""
MEMORY: Final = struct.Struct("=II")
REGION: Final = struct.Struct("=QQQQ")
SCSI_TARGET: Final = struct.Struct("=i224sHH")
_IOTLB_MESSAGE: Final = struct.Struct("=i4xQQQBB38x")
_IOTLB: Final = 1
_IOTLB_UPDATE: Final = 2
_READ_WRITE: Final = 3
VRING_LOG: Final = 1
"""The flag of ADDRESSES that has the device log what it writes to the used ring."""


def ioctl(fd: int, request: Ioctl, data: bytes = b"") -> bytes:
    """Make a request, and return `data` as the kernel changed it.

    Raises:
        OSError: the kernel refused it; the message names the request.
    """
    buffer = bytearray(data)
    try:
        fcntl.ioctl(fd, request, buffer if data else 0)
    except OSError as error:
        raise OSError(error.errno, f"VHOST_{request.name}: {error.strerror}") from None
    return bytes(buffer)


def update_iotlb(fd: int, iova: int, length: int, address: int) -> None:
    """Map `length` bytes at `iova` to the process's memory at `address`."""
    message = _IOTLB_MESSAGE.pack(_IOTLB, iova, length, address, _READ_WRITE, _IOTLB_UPDATE)
    os.write(fd, message)
