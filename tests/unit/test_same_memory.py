"""Detection of RAM that is the same part of one file on both sides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.memory.guest_ram import GuestRam
from qmp_tools.memory.physical_map import CommonRange, MapRegion
from qmp_tools.memory.process_memory import SharedMemory
from qmp_tools.qemu.qemu import Qemu
from qmp_tools.ram_check.same_memory import is_same_memory

MIB = 1 << 20
REGION = MapRegion(16 * MIB, 8 * MIB, "ram", "ram0")


def ram(offset: int | None, inode: int = 7, device: int = 1) -> GuestRam:
    """Return 8 MiB of RAM at `offset` in a file; private if `offset` is None."""
    return GuestRam(
        qemu=cast(Qemu, None),
        regions=[REGION],
        hvas={},
        shared={} if offset is None else {REGION: SharedMemory(-1, offset, device, inode)},
        process=None,
        backends={},
        dimms={},
        folder=Path(),
        boot_id="this boot",
    )


def same(source: GuestRam, destination: GuestRam) -> bool:
    part = CommonRange(18 * MIB, 2 * MIB, REGION, REGION)
    return is_same_memory(source, destination, part)


def test_the_same_place_in_the_same_file_is_the_same_memory() -> None:
    assert same(ram(4 * MIB), ram(4 * MIB))


def test_other_files_other_parts_and_private_copies_are_not_the_same_memory() -> None:
    assert not same(ram(0), ram(0, inode=8))
    assert not same(ram(0), ram(0, device=2))
    assert not same(ram(0), ram(8 * MIB))
    assert not same(ram(None), ram(None))
    assert not same(ram(0), ram(None))


@pytest.mark.parametrize("offset", [4096, 3 * MIB, -3 * MIB])
def test_parts_that_overlap_are_refused(offset: int) -> None:
    with pytest.raises(UntestableError, match="each QEMU writes to the other's RAM"):
        same(ram(4 * MIB), ram(4 * MIB - offset))


@pytest.mark.parametrize(("source", "destination"), [(6 * MIB, 0), (0, 4 * MIB)])
def test_parts_that_touch_do_not_overlap(source: int, destination: int) -> None:
    assert not same(ram(source), ram(destination))


def test_the_same_memory_is_found_if_the_maps_have_different_edges() -> None:
    other = MapRegion(18 * MIB, 2 * MIB, "ram", "ram0", 2 * MIB)
    destination = replace(
        ram(None), regions=[other], shared={other: SharedMemory(-1, 6 * MIB, 1, 7)}
    )
    part = CommonRange(18 * MIB, 2 * MIB, REGION, other)
    assert is_same_memory(ram(4 * MIB), destination, part)
