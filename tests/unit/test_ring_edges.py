"""Edge cases of a stopped device's rings: full, at a tie, partly outside RAM."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import pytest

from qmp_tools.proof.rings import Ring, stopped_rings
from qmp_tools.qemu.qmp import QmpRefusal

SIZE = 128
DESCRIPTORS, AVAILABLE, USED = 0x1000, 0x2000, 0x3000


def ring(answered: int, used: int, available: int, side: str = "source") -> Ring:
    return Ring(side, "virtio-blk", 0, SIZE, answered, used, available)


@pytest.mark.parametrize("used", [0, 100, 0xFFC0])
def test_a_ring_may_be_exactly_full(used: int) -> None:
    full = (used + SIZE) % (1 << 16)
    assert ring(used, used, full).is_consistent
    assert not ring(used, used, (full + 1) % (1 << 16)).is_consistent


def test_a_tie_between_both_indices_is_reported_as_too_few() -> None:
    story = ring(0x8000 + 50, 0, 100).story
    assert "at least 32718 too low" in story


@pytest.mark.parametrize(
    ("ahead", "why"),
    [
        (0x8000, "the device's last writes to its used ring are missing"),
        (0x7FFF, "the device has finished 32767 more requests"),
    ],
)
def test_the_shorter_distance_decides_which_index_is_ahead(ahead: int, why: str) -> None:
    assert why in ring(0, ahead, 0).story


class PausedQemu:
    """A QEMU that reports the addresses of one queue's rings and the values `reported`."""

    def __init__(self, **reported: int) -> None:
        self._reported = {
            "vring-desc": DESCRIPTORS,
            "vring-avail": AVAILABLE,
            "vring-used": USED,
            "vring-num": SIZE,
            **reported,
        }

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "x-query-virtio":
            return [{"name": "virtio-blk", "path": "/machine/disk"}]
        if arguments["queue"]:
            raise QmpRefusal("Invalid virtqueue number 1")
        return self._reported


def read(gpa: int, length: int) -> bytes | None:
    """Read RAM that has both indices, each after 16 bits of flags."""
    return struct.pack("<H", {AVAILABLE + 2: 12, USED + 2: 10}[gpa])[:length]


def rings_of(qemu: PausedQemu, missing: int | None = None) -> list[Ring]:
    """Return the rings read from RAM in which GPA `missing` does not exist."""

    def read_existing(gpa: int, length: int) -> bytes | None:
        return None if gpa == missing else read(gpa, length)

    return list(asyncio.run(stopped_rings(cast(Any, qemu), {"source": read_existing})))


def test_a_ring_in_ram_is_read() -> None:
    assert rings_of(PausedQemu(**{"last-avail-idx": 11})) == [ring(11, 10, 12)]


@pytest.mark.parametrize("missing", [AVAILABLE + 2, USED + 2])
def test_a_ring_with_one_index_outside_ram_is_not_read(missing: int) -> None:
    assert rings_of(PausedQemu(**{"last-avail-idx": 11}), missing) == []


def test_a_ring_without_a_reported_answer_is_not_read() -> None:
    assert rings_of(PausedQemu()) == []
