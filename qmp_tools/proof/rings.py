"""Check the answer of a stopped device to GET_VRING_BASE against the ring in RAM.

QEMU stops a vhost-user device by GET_VRING_BASE and stores the answer as the ring's last_avail_idx
(vhost_virtqueue_stop), at which the destination starts. The answer is the index of the request
that the device would take next. On a split ring it cannot be before the used index, which counts
the requests that the device has finished, nor after the available index, which counts those that
the driver has made available (virtio 1.2, 2.7.6 and 2.7.8). All three count modulo 2^16.

QEMU's reaction to a wrong answer does not name the cause: the destination refuses the device's
state, or marks the device as broken and leaves the guest waiting (virtio_load).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..qemu.machine import DESTINATION
from ..qemu.qmp import Qmp, QmpRefusal

_WRAP: Final = 1 << 16
_INDEX: Final = struct.Struct("<H")
_INDEX_OFFSET: Final = 2
"""The offset of idx, which follows flags in both the available and the used ring."""

ReadRam = Callable[[int, int], bytes | None]
"""Reads a number of bytes at a guest-physical address; returns None where there is no RAM."""


@dataclass(frozen=True)
class Ring:
    """A split ring in the RAM of `side`, a paused QEMU; `device` is QEMU's name for its type.

    `used` and `available` are the indices in that RAM. `answered` is the answer of the source's
    device to GET_VRING_BASE. `size` is in descriptors.
    """

    side: str
    device: str
    queue: int
    size: int
    answered: int
    used: int
    available: int

    @property
    def is_answered_right(self) -> bool:
        """Whether the answer lies between the used and the available index."""
        return (self.answered - self.used) % _WRAP <= self._outstanding

    @property
    def is_consistent(self) -> bool:
        """Whether the ring has room for the requests that are outstanding."""
        return self._outstanding <= self.size

    @property
    def _outstanding(self) -> int:
        return (self.available - self.used) % _WRAP

    @property
    def story(self) -> str:
        """A sentence that says what is wrong with this ring; only for a ring that is wrong."""
        ring = f"queue {self.queue} of {self.device}"
        figures = f"used index {self.used} and available index {self.available}"
        if not self.is_consistent:
            return (
                f"{ring}: {figures} in the {self.side}'s RAM are impossible for a ring of "
                f"{self.size} descriptors: {self._why_inconsistent}"
            )
        few, many = (self.used - self.answered) % _WRAP, (self.answered - self.available) % _WRAP
        wrong = f"{few} too low" if few <= many else f"{many} too high"
        return (
            f"{ring}: the device answered GET_VRING_BASE with {self.answered}, at least {wrong}: "
            f"the ring in the {self.side}'s RAM has {figures}, and the answer must lie between them"
        )

    @property
    def _why_inconsistent(self) -> str:
        too_many = (self.used - self.available) % _WRAP
        if too_many >= _WRAP // 2:  # then the available index is ahead
            return "the device's last writes to its used ring are missing"
        if self.side == DESTINATION:
            return "the driver's last writes to its available ring are missing"
        return (
            f"the device has finished {too_many} more requests than it was given, as if it had "
            f"started at a wrong index; it answered GET_VRING_BASE with {self.answered}"
        )


async def stopped_rings(qmp: Qmp, rams: Mapping[str, ReadRam]) -> Sequence[Ring]:
    """Return the rings that the guest of a paused QEMU uses, as they are in each side's `rams`.

    All must be split rings. QEMU before 7.2 does not report its rings: the result is then empty.
    """
    found: list[Ring] = []
    try:
        devices: list[dict[str, Any]] = await qmp.execute("x-query-virtio")
    except QmpRefusal:
        return []
    for device in devices:
        for queue in itertools.count():
            try:
                status: dict[str, Any] = await qmp.execute(
                    "x-query-virtio-queue-status", path=device["path"], queue=queue
                )
            except QmpRefusal:  # the device has no more queues
                break
            name = device["name"]
            rings = (_ring(side, name, queue, status, read) for side, read in rams.items())
            found += [ring for ring in rings if ring]
    return found


def _ring(side: str, device: str, queue: int, status: dict[str, Any], read: ReadRam) -> Ring | None:
    if not status["vring-desc"] or "last-avail-idx" not in status:
        return None
    available, used = (
        read(status[member] + _INDEX_OFFSET, _INDEX.size)
        for member in ("vring-avail", "vring-used")
    )
    if available is None or used is None:
        return None
    return Ring(
        side=side,
        device=device,
        queue=queue,
        size=status["vring-num"],
        answered=status["last-avail-idx"],
        used=_INDEX.unpack(used)[0],
        available=_INDEX.unpack(available)[0],
    )
