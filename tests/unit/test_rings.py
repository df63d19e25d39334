"""The answers to GET_VRING_BASE that can be right, and the messages about those that cannot."""

from __future__ import annotations

import asyncio
import re
import struct
from typing import Any, cast

import pytest

from qmp_tools.proof.rings import Ring, stopped_rings
from qmp_tools.qemu.qmp import QmpRefusal


def ring(answered: int, used: int, available: int, side: str = "source") -> Ring:
    return Ring(side, "virtio-blk", 0, 128, answered, used, available)


@pytest.mark.parametrize("answered", [100, 103, 110])
def test_an_answer_between_used_and_available_is_right(answered: int) -> None:
    stopped = ring(answered, 100, 110)
    assert stopped.is_answered_right
    assert stopped.is_consistent


@pytest.mark.parametrize(
    ("answered", "used", "available"),
    [(0xFFFF, 0xFFFE, 2), (0, 0xFFFE, 2), (2, 0xFFFE, 2), (5, 5, 5)],
)
def test_an_answer_is_right_when_the_indices_wrap(answered: int, used: int, available: int) -> None:
    assert ring(answered, used, available).is_answered_right


@pytest.mark.parametrize(
    ("answered", "used", "available", "wrong"),
    [
        (97, 100, 110, "3 too low"),
        (0, 100, 110, "100 too low"),
        (113, 100, 110, "3 too high"),
        (0xFFFD, 0, 4, "3 too low"),
        (2, 0xFFF0, 0xFFFF, "3 too high"),
    ],
)
def test_a_wrong_answer_is_reported_with_its_distance(
    answered: int, used: int, available: int, wrong: str
) -> None:
    stopped = ring(answered, used, available)
    assert not stopped.is_answered_right
    assert f"with {answered}, at least {wrong}" in stopped.story
    assert f"used index {used} and available index {available}" in stopped.story


@pytest.mark.parametrize(
    ("used", "available", "side", "why"),
    [
        (0, 129, "source", "the device's last writes to its used ring are missing"),
        (0xFFF0, 0x90, "destination", "the device's last writes to its used ring are missing"),
        (101, 100, "destination", "the driver's last writes to its available ring are missing"),
        (103, 100, "source", "has finished 3 more requests .* GET_VRING_BASE with 100"),
        (1, 0xFFFE, "source", "has finished 3 more requests .* GET_VRING_BASE with 65534"),
    ],
)
def test_impossible_indices_are_reported_with_their_cause(
    used: int, available: int, side: str, why: str
) -> None:
    stopped = ring(available, used, available, side)
    assert stopped.is_answered_right
    assert not stopped.is_consistent
    assert f"in the {side}'s RAM are impossible for a ring of 128 descriptors: " in stopped.story
    assert re.search(why, stopped.story)


DESCRIPTORS, AVAILABLE, USED = 0x1000, 0x2000, 0x3000


class PausedQemu:
    """A QEMU with two queues, of which the guest uses the first."""

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "x-query-virtio":
            return [{"name": "virtio-blk", "path": "/machine/disk"}]
        assert command == "x-query-virtio-queue-status"
        assert arguments["path"] == "/machine/disk"
        if arguments["queue"] == 2:
            raise QmpRefusal("Invalid virtqueue number 2")
        used = arguments["queue"] == 0
        return {
            "vring-desc": DESCRIPTORS if used else 0,
            "vring-avail": AVAILABLE if used else 0,
            "vring-used": USED if used else 0,
            "vring-num": 128,
            "last-avail-idx": 7 if used else 0,
        }


class QemuBefore72(PausedQemu):
    async def execute(self, command: str, **arguments: Any) -> Any:
        raise QmpRefusal(f"The command {command} has not been found")


def read(gpa: int, length: int) -> bytes | None:
    """Read RAM in which the ring's indices follow 16 bits of flags."""
    indices = {AVAILABLE + 2: 12, USED + 2: 10}
    return struct.pack("<H", indices[gpa])[:length]


def test_rings_are_read_at_the_addresses_that_qemu_reports() -> None:
    rams = {"source": read, "destination": lambda gpa, length: bytes(length)}
    found = asyncio.run(stopped_rings(cast(Any, PausedQemu()), rams))
    assert found == [ring(7, 10, 12), ring(7, 0, 0, "destination")]
    assert not found[0].is_answered_right


def test_a_ring_outside_ram_is_ignored() -> None:
    rams = {"source": lambda gpa, length: None}
    assert asyncio.run(stopped_rings(cast(Any, PausedQemu()), rams)) == []


def test_a_qemu_without_the_query_reports_no_rings() -> None:
    assert asyncio.run(stopped_rings(cast(Any, QemuBefore72()), {"source": read})) == []
