"""The resources of a process are counted, and growth is distinguished from the warm-up."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.proof.soak import Holdings, growth, holdings_of

MIB = 1 << 20


def holdings(private_mib: float = 20, descriptors: int = 9, shared_objects: int = 3) -> Holdings:
    return Holdings(round(private_mib * MIB), descriptors, shared_objects)


def test_a_memfd_is_counted_open_or_mapped() -> None:
    before = holdings_of(os.getpid())
    fd = os.memfd_create("held")
    os.ftruncate(fd, mmap.PAGESIZE)
    opened = holdings_of(os.getpid())
    assert opened.shared_objects == before.shared_objects + 1
    assert opened.descriptors == before.descriptors + 1
    mapping = mmap.mmap(fd, mmap.PAGESIZE)  # mmap has a duplicate of its own
    os.close(fd)
    assert holdings_of(os.getpid()).shared_objects == before.shared_objects + 1
    mapping.close()
    assert holdings_of(os.getpid()).shared_objects == before.shared_objects


def touch(mapping: mmap.mmap) -> None:
    for page in range(0, len(mapping), mmap.PAGESIZE):
        mapping[page] = 1


def test_only_private_memory_is_counted() -> None:
    before = holdings_of(os.getpid())
    with mmap.mmap(-1, 64 * MIB) as shared:  # anonymous and shared: the kernel's /dev/zero
        touch(shared)
        assert holdings_of(os.getpid()).private_bytes < before.private_bytes + 32 * MIB
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE) as private:  # a heap might have free space
        touch(private)
        assert holdings_of(os.getpid()).private_bytes > before.private_bytes + 48 * MIB


def test_a_process_that_has_ended_is_reported() -> None:
    no_process = int(
        Path("/proc/sys/kernel/pid_max").read_text()
    )  # one more than the highest process id
    with pytest.raises(
        UntestableError, match=f"the resources of process {no_process} cannot be read"
    ):
        holdings_of(no_process)


def test_the_warm_up_is_not_growth() -> None:
    seen = [holdings(private_mib=mib) for mib in (5, 18, *[20] * 10)]
    assert growth("tool", seen).is_none


def test_a_spike_is_not_growth() -> None:
    seen = [holdings()] * 20
    seen[17] = holdings(private_mib=60, descriptors=30)
    assert growth("tool", seen).is_none


@pytest.mark.parametrize("step", [holdings(1, 0, 0), holdings(0, 1, 0), holdings(0, 0, 1)])
def test_small_growth_at_each_migration_is_growth(step: Holdings) -> None:
    seen = [
        holdings(
            private_mib=20 + number * step.private_bytes / MIB,
            descriptors=9 + number * step.descriptors,
            shared_objects=3 + number * step.shared_objects,
        )
        for number in range(40)
    ]
    assert not growth("tool", seen).is_none


def test_a_single_migration_has_no_growth() -> None:
    assert growth("tool", [holdings()]).is_none


@pytest.mark.parametrize("migrations", range(1, 9))
def test_a_process_that_holds_more_while_its_side_has_the_guest_does_not_grow(
    migrations: int,
) -> None:
    for low, high in ((5, 9), (9, 5)):
        seen = [Holdings(0, (low, high)[number % 2], 0) for number in range(migrations)]
        assert growth("source device", seen).is_none
