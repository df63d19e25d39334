"""A back end that is killed at any step: its successor returns every request exactly once.

An exception at the n-th step simulates the kill. Each write to guest RAM and each update of the
in-flight region is two steps, one before it and one after it.
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
    """The process has been killed."""


class Steps:
    """Counts the steps of one process, and kills it after step `last`."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


class KillableDma(Dma):
    def __init__(self, steps: Steps, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._steps = steps

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        self._steps.step()
        super().write(iova, data, kind)
        self._steps.step()


@contextlib.contextmanager
def killable_updates(steps: Steps) -> Iterator[None]:
    """Make each update of the region two more steps."""

    def killable(update: Callable[..., None]) -> Callable[..., None]:
        def updated(*arguments: Any) -> None:
            steps.step()
            update(*arguments)
            steps.step()

        return updated

    with pytest.MonkeyPatch.context() as patch:
        for region in (inflight.SplitRegion, inflight.PackedRegion):
            for name in ("begin", "taken", "giving_back", "given_back"):
                patch.setattr(region, name, killable(getattr(region, name)))
        yield


@settings(max_examples=400)
@given(
    form=st.sampled_from(sorted(DRIVERS)),
    lives=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    data=st.data(),
)
def test_no_request_is_lost_or_returned_twice(
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
                expected[driver.submit(buffers, table)] = [buffer.address for buffer in buffers]
                requests += 1
            steps = Steps(last_step)
            dma = dma_for(driver.memory, make_dma=functools.partial(KillableDma, steps))
            # QEMU cannot ask a dead back end for a packed ring's base, so it repeats the old one.
            # It reads the used index of a split ring from RAM.
            if isinstance(driver, RingDriver):
                base = driver.used_index
            with contextlib.suppress(KilledError), killable_updates(steps):
                queue = InflightVirtqueue(queue_for(driver, dma, base=base), region)
                taken: list[DescriptorChain] = []
                at_a_time = data.draw(st.integers(1, 3), label="at a time")
                while True:
                    while len(taken) < at_a_time and (chain := queue.pop()) is not None:
                        assert [segment.iova for segment in chain.writable] == expected[chain.head]
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
def test_a_properly_stopped_ring_leaves_an_unused_region(form: str) -> None:
    fd, file = make_file(2, SIZE)
    regions = InflightRegions(fd, file)
    part = regions.region(1, SIZE)
    assert part is not None
    with driver_of(DRIVERS[form]) as driver:
        assert not regions.predecessor_died
        queue = InflightVirtqueue(queue_for(driver), part)
        assert regions.predecessor_died
        assert InflightRegions(fd, file).predecessor_died, "a new mapping of the file shows it too"
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


def test_a_ring_larger_than_announced_is_recorded_too() -> None:
    regions = InflightRegions(*make_file(2, SIZE))
    for ring in (0, 1):
        part = regions.region(ring, 1024)
        assert part is not None
        assert len(part) == region_bytes(1024)
    assert regions.region(1, 2048) is None
    assert regions.region(2, SIZE) is None


@pytest.mark.parametrize("form", sorted(DRIVERS))
def test_requests_in_flight_are_repeated_in_order(form: str) -> None:
    """After two kills, and although neither heads nor entries are in this order."""
    region = memoryview(bytearray(region_bytes(SIZE)))
    with driver_of(DRIVERS[form]) as driver:
        first_base = driver.base

        def start() -> InflightVirtqueue:
            """Start with the used index of a split ring, or with a packed ring's old base."""
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

        queue = start()
        submit(6)
        for chain in pop(queue, 6):
            queue.push(chain, 1)
        driver.collect()
        order = submit(4)
        assert heads(pop(queue, 4)) == order

        queue = start()
        assert queue.ask_for_kick(), "the requests in flight need no kick"
        taken = pop(queue, 4)
        assert heads(taken) == order
        assert not queue.ask_for_kick()
        queue.push(taken[1], 1)
        del order[1]
        order += submit(2)
        assert heads(pop(queue, 2)) == order[-2:]

        queue = start()
        taken = pop(queue, 5)
        assert heads(taken) == order
        for chain in taken:
            queue.push(chain, 1)
        assert len(driver.collect()) == 6
        queue.end()
        assert bytes(region) == bytes(len(region))
