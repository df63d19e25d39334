"""The layout of guest RAM, the rings in it, and the log."""

from __future__ import annotations

from typing import Final

from dmaproof.vhost_user.features import (
    F_PROTOCOL_FEATURES,
    F_RING_INDIRECT_DESC,
    F_VERSION_1,
)
from qmp_tools.testbed.ring_driver import PAGE

FEATURES: Final = F_VERSION_1 | F_PROTOCOL_FEATURES | F_RING_INDIRECT_DESC
QUEUE_SIZE: Final = 8
DISK_BYTES: Final = 1 << 24
DEPTHS: Final = (0, 1, 2, 2, 3, 3, 3)
"""How many of QEMU's three first steps precede the random ones."""

LOW: Final = (0, 24 * PAGE, 4 * PAGE)
RAM_BYTES: Final = 64 * PAGE
HIGH_GPAS: Final = (64 * PAGE, 1 << 32)
HIGH_BYTES, HIGH_OFFSET = 9 * PAGE, 40 * PAGE
LOG_OFFSET: Final = 64
CANARY: Final = 0xA5

RINGS: Final = (PAGE, 4 * PAGE)
"""GPAs of the two rings: the descriptors, followed by the driver's area (the available ring or the
event suppression structure). The device's area is one page further."""
AVAIL, USED = 1 << 7, 1 << 15
TABLE, HEADER, STATUS, DATA = 8 * PAGE, 10 * PAGE, 11 * PAGE, 12 * PAGE
