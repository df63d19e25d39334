"""A back end that is killed anywhere: its successor gives every request back, and none twice.

A kill is played by an exception that comes at the n-th step of the traffic. Steps are the writes to
guest RAM and the notes in the region of what is in flight, before and after each of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmaproof.dma import Dma
from dmaproof.errors import ProtocolError
from dmaproof.journal import WriteKind
from dmaproof.vhost_user import inflight
from dmaproof.vhost_user.inflight import InflightRegions, InflightVirtqueue, make_file, region_bytes
from dmaproof.vhost_user.messages import InflightFile
from dmaproof.virtqueue import DescriptorChain
from qmp_tools.testbed.ring_driver import PAGE, WRITE, Buffer, RingDriver
from support.rings import DATA, DRIVERS, SIZE, TABLES, dma_for, driver_of, queue_for


class KilledError(Exception):
    """The process is gone, here and now."""


class Steps:
    """Counts the steps of one life, and ends it at `last`."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


class MortalDma(Dma):
    def __init__(self, steps: Steps, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._steps = steps

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        self._steps.step()
        super().write(iova, data, kind)
        self._steps.step()


@contextlib.contextmanager
def mortal_notes(steps: Steps) -> Iterator[None]:
    """Each note in the region is two more steps."""

    def mortal(note: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any) -> None:
            steps.step()
            note(*arguments)
            steps.step()

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for region in (inflight.SplitRegion, inflight.PackedRegion):
            for name in ("begin", "taken", "giving_back", "given_back"):
                patch.setattr(region, name, mortal(getattr(region, name)))
        yield


@settings(max_examples=400)
@given(
    form=st.sampled_from(sorted(DRIVERS)),
    lives=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    data=st.data(),
)
def test_nothing_is_lost_or_given_back_twice(
    form: str, lives: list[int], data: st.DataObject
) -> None:
    region = memoryview(bytearray(region_bytes(SIZE)))
    with driver_of(DRIVERS[form]) as driver:
        base = driver.base
        expected: dict[int, list[int]] = {}
        requests = 0
        for last_step in [*lives, 1 << 30]:
            for _ in range(data.draw(st.integers(0, 3), label="requests")):
                pieces = data.draw(st.integers(1, 3))
                if sum(map(len, expected.values())) + pieces > SIZE:
                    break
                buffers = [Buffer(DATA + 8 * i, i + 1, WRITE) for i in range(pieces)]
                table = TABLES + PAGE * (requests % 32) if data.draw(st.booleans()) else None
                expected[driver.submit(buffers, table)] = [it.address for it in buffers]
                requests += 1
            steps = Steps(last_step)
            dma = dma_for(driver.memory, make_dma=functools.partial(MortalDma, steps))
            # QEMU cannot ask a dead back end for a packed ring's base: the old one comes again. Of
            # a split ring it knows the used index.
            if isinstance(driver, RingDriver):
                base = driver.used_index
            with contextlib.suppress(KilledError), mortal_notes(steps):
                queue = InflightVirtqueue(queue_for(driver, dma, base=base), region)
                taken: list[DescriptorChain] = []
                at_a_time = data.draw(st.integers(1, 3), label="at a time")
                while True:
                    while len(taken) < at_a_time and (chain := queue.pop()) is not None:
                        assert [it.iova for it in chain.writable] == expected[chain.head]
                        taken.append(chain)
                    if not taken:
                        break
                    chain = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
                    for segment in chain.writable:
                        dma.write(segment.iova, b"x")
                    queue.push(chain, len(chain.writable))
            for number, written in driver.collect():
                assert written == len(expected.pop(number))
        assert not expected


@pytest.mark.parametrize("form", sorted(DRIVERS))
def test_a_ring_that_was_stopped_in_good_order_leaves_nothing(form: str) -> None:
    fd, file = make_file(2, SIZE)
    regions = InflightRegions(fd, file)
    part = regions.region(1, SIZE)
    assert part is not None
    with driver_of(DRIVERS[form]) as driver:
        assert not regions.predecessor_died
        queue = InflightVirtqueue(queue_for(driver), part)
        assert regions.predecessor_died
        assert InflightRegions(fd, file).predecessor_died, "whoever is handed the file can tell"
        queue.end()
        assert not regions.predecessor_died


@pytest.mark.parametrize(
    "file",
    [
        InflightFile(2 * region_bytes(SIZE) - 1, 0, 2, SIZE),
        InflightFile(2 * region_bytes(SIZE), 1, 2, SIZE),
        InflightFile(0, 0, 0, 0),
    ],
)
def test_a_file_that_is_too_short_is_refused(file: InflightFile) -> None:
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 2 * region_bytes(SIZE))
    with pytest.raises(ProtocolError, match="SET_INFLIGHT_FD"):
        InflightRegions(fd, file)


@pytest.mark.parametrize("form", sorted(DRIVERS))
def test_a_region_of_another_ring_is_refused(form: str) -> None:
    region = memoryview(bytearray(region_bytes(SIZE)))
    region[8], region[10] = 1, 2 * SIZE
    with driver_of(DRIVERS[form]) as driver, pytest.raises(ProtocolError, match="a ring of 16"):
        InflightVirtqueue(queue_for(driver), region)


def test_a_ring_larger_than_the_front_end_said_is_noted_too() -> None:
    regions = InflightRegions(*make_file(2, SIZE))
    for ring in (0, 1):
        part = regions.region(ring, 1024)
        assert part is not None
        assert len(part) == region_bytes(1024)
    assert regions.region(1, 2048) is None
    assert regions.region(2, SIZE) is None


@pytest.mark.parametrize("form", sorted(DRIVERS))
def test_requests_in_flight_come_again_in_their_order(form: str) -> None:
    """Through two deaths, and although neither heads nor entries are in that order."""
    region = memoryview(bytearray(region_bytes(SIZE)))
    with driver_of(DRIVERS[form]) as driver:
        first_base = driver.base

        def life() -> InflightVirtqueue:
            """QEMU knows the used index of a split ring, and of a packed one only the old base."""
            base = driver.used_index if isinstance(driver, RingDriver) else first_base
            return InflightVirtqueue(queue_for(driver, base=base), region)

        def submit(requests: int) -> list[int]:
            return [driver.submit([Buffer(DATA, 1, WRITE)]) for _ in range(requests)]

        def pop(queue: InflightVirtqueue, requests: int) -> list[DescriptorChain]:
            chains = [queue.pop() for _ in range(requests)]
            assert queue.pop() is None
            return [chain for chain in chains if chain is not None]

        def heads(chains: list[DescriptorChain]) -> list[int]:
            return [chain.head for chain in chains]

        queue = life()
        submit(6)
        for chain in pop(queue, 6):
            queue.push(chain, 1)
        driver.collect()
        order = submit(4)
        assert heads(pop(queue, 4)) == order

        queue = life()
        assert queue.ask_for_kick(), "there is something to do without a kick"
        taken = pop(queue, 4)
        assert heads(taken) == order
        assert not queue.ask_for_kick()
        queue.push(taken[1], 1)
        del order[1]
        order += submit(2)
        assert heads(pop(queue, 2)) == order[-2:]

        queue = life()
        taken = pop(queue, 5)
        assert heads(taken) == order
        for chain in taken:
            queue.push(chain, 1)
        assert len(driver.collect()) == 6
        queue.end()
        assert bytes(region) == bytes(len(region))
