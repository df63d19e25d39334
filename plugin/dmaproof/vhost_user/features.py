"""The feature bits that the back end offers for every device.

They are virtio's reserved feature bits (virtio 1.2, section 6), vhost's VHOST_F_LOG_ALL, and the
protocol features of vhost-user.
"""

from __future__ import annotations

from typing import Final

from .messages import ProtocolFeature

F_LOG_ALL: Final = 1 << 26
F_RING_INDIRECT_DESC: Final = 1 << 28
F_RING_EVENT_IDX: Final = 1 << 29
F_PROTOCOL_FEATURES: Final = 1 << 30
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33
F_RING_PACKED: Final = 1 << 34

TRANSPORT_FEATURES: Final = (
    F_LOG_ALL
    | F_RING_INDIRECT_DESC
    | F_RING_EVENT_IDX
    | F_PROTOCOL_FEATURES
    | F_VERSION_1
    | F_ACCESS_PLATFORM
    | F_RING_PACKED
)
PROTOCOL_FEATURES: Final = int(
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.PAGEFAULT
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
)
