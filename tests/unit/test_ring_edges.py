"""What the rings of a stopped device tell at the edges: full, at a tie, partly outside RAM."""

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


def test_an_answer_equally_far_from_both_ends_is_reported_as_too_few() -> None:
    story = ring(0x8000 + 50, 0, 100).story
    assert "at least 32718 too few" in story


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
    """A QEMU with one queue, of which it reports `told` besides where its rings are."""

    def __init__(self, **told: int) -> None:
        self._told = {
            "vring-desc": DESCRIPTORS,
            "vring-avail": AVAILABLE,
            "vring-used": USED,
            "vring-num": SIZE,
            **told,
        }

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "x-query-virtio":
            return [{"name": "virtio-blk", "path": "/machine/disk"}]
        if arguments["queue"]:
            raise QmpRefusal("Invalid virtqueue number 1")
        return self._told


def read(gpa: int, length: int) -> bytes | None:
    """RAM in which both indices stand behind 16 bits of flags."""
    return struct.pack("<H", {AVAILABLE + 2: 12, USED + 2: 10}[gpa])[:length]


def rings_of(qemu: PausedQemu, missing: int | None = None) -> list[Ring]:
    """The rings as they are in RAM that is not there at GPA `missing`."""

    def read_what_is_there(gpa: int, length: int) -> bytes | None:
        return None if gpa == missing else read(gpa, length)

    return list(asyncio.run(stopped_rings(cast(Any, qemu), {"source": read_what_is_there})))


def test_a_ring_in_ram_is_read() -> None:
    assert rings_of(PausedQemu(**{"last-avail-idx": 11})) == [ring(11, 10, 12)]


@pytest.mark.parametrize("missing", [AVAILABLE + 2, USED + 2])
def test_a_ring_of_which_one_index_is_outside_ram_is_none(missing: int) -> None:
    assert rings_of(PausedQemu(**{"last-avail-idx": 11}), missing) == []


def test_a_ring_whose_answer_qemu_does_not_report_is_none() -> None:
    assert rings_of(PausedQemu()) == []
