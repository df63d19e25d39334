"""The bare guest's driver: every request on any ring arrives once, and is answered once.

The device answers in any order and is replaced in mid-traffic, as by a migration: it continues from
its base alone. It is also reset in mid-traffic: then both sides begin again. The driver must kick
exactly for the requests for which the device wants a kick.
"""

from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmaproof.vhost_user.features import F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_RING_PACKED
from dmaproof.virtqueue import (
    DescriptorChain,
    PackedVirtqueue,
    Segment,
    SplitVirtqueue,
    Virtqueue,
)
from dmaproof.virtqueue.packed import INITIAL_BASE
from support.bare_ring import DATA, GAVE_UP, BareRing, build, guest_ram
from support.rings import dma_for

MAX_PIECES = 18  # of virtqueue.h


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("bare-ring"))


def queue_for(ring: BareRing, features: int, size: int, base: int | None = None) -> Virtqueue:
    packed = bool(features & F_RING_PACKED)
    if base is None:
        base = INITIAL_BASE if packed else 0
    make_queue = PackedVirtqueue if packed else SplitVirtqueue
    return make_queue(
        dma_for(ring.memory),
        ring.addresses,
        size,
        base=base,
        event_index=bool(features & F_RING_EVENT_IDX),
        indirect=True,
    )


@given(
    packed=st.booleans(),
    event_index=st.booleans(),
    size=st.sampled_from([1, 2, 3, 4, 8, 24, 32]),
    places=st.integers(1, 5),
    data=st.data(),
)
def test_a_submitted_request_arrives_and_comes_back(
    library: ctypes.CDLL,
    packed: bool,
    event_index: bool,
    size: int,
    places: int,
    data: st.DataObject,
) -> None:
    features = F_RING_INDIRECT_DESC
    features |= F_RING_PACKED if packed else 0
    features |= F_RING_EVENT_IDX if event_index else 0
    if not packed:
        size = 1 << size.bit_length() - 1
    places = min(places, size)
    with guest_ram() as (memory, start):
        ring = BareRing(library, memory, start, features, size, places)
        queue = queue_for(ring, features, size)
        free = list(range(places))
        submitted: list[tuple[int, list[Segment], list[Segment]]] = []
        taken: list[tuple[int, DescriptorChain]] = []
        given_back: list[int] = []
        popped = 0
        kick_at: int | None = None  # the request for which the device wants a notification
        for _ in range(data.draw(st.integers(1, 80))):
            step = data.draw(st.sampled_from(["submit", "pop", "push", "poll", "restart", "reset"]))
            if step == "submit" and free:
                place = free.pop(data.draw(st.integers(0, len(free) - 1)))
                pieces = data.draw(st.integers(1, MAX_PIECES))
                readable = data.draw(st.integers(0, pieces))
                first = start + DATA + data.draw(st.integers(0, 4096))
                segments = [Segment(first + 64 * i, i + 1) for i in range(pieces)]
                kick = ring.submit(place, segments[:readable], segments[readable:])
                if kick_at is not None and event_index:
                    assert kick is (kick_at == popped + len(submitted))
                else:
                    assert kick or event_index
                submitted.append((place, segments[:readable], segments[readable:]))
            elif step == "pop":
                chain = queue.pop()
                if submitted:
                    assert chain is not None
                    place, *expected = submitted.pop(0)
                    assert [chain.readable, chain.writable] == expected
                    taken.append((place, chain))
                    popped += 1
                else:
                    assert chain is None
                assert queue.ask_for_kick() is bool(submitted)
                kick_at = popped
            elif step == "push" and taken:
                place, chain = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
                queue.push(chain, data.draw(st.integers(0, 1 << 31)) if chain.writable else 0)
                assert not queue.wants_interrupt()
                given_back.append(place)
            elif step == "poll":
                for place in given_back:
                    assert ring.poll() == place
                assert ring.poll() == -1
                free += given_back
                given_back = []
            elif step == "restart":
                queue = queue_for(ring, features, size, queue.base)
            elif step == "reset":
                ring.reset()
                queue = queue_for(ring, features, size)
                free = list(range(places))
                submitted, taken, given_back = [], [], []
                popped, kick_at = 0, None


@pytest.mark.parametrize("start", range(16))
@pytest.mark.parametrize(("awaited", "kick"), [(0, True), (2, True), (3, False), (8, False)])
def test_a_packed_ring_kicks_only_for_the_awaited_descriptor(
    library: ctypes.CDLL, start: int, awaited: int, kick: bool
) -> None:
    size, features = 8, F_RING_PACKED | F_RING_EVENT_IDX | F_RING_INDIRECT_DESC
    with guest_ram() as (memory, gpa):
        ring = BareRing(library, memory, gpa, features, size, places=1)
        queue = queue_for(ring, features, size)
        for _ in range(start):
            ring.submit(0, [Segment(gpa, 1)], [])
            chain = queue.pop()
            assert chain is not None
            queue.push(chain, 0)
            assert ring.poll() == 0
        position = (start + awaited) % (2 * size)
        offset = position % size | (0x8000 if position < size else 0)
        memory.view(ring.addresses.device, 4)[:] = struct.pack("<HH", offset, 2)
        assert ring.submit(0, [Segment(gpa, 1)] * 3, []) is kick


@pytest.mark.parametrize("features", [F_RING_INDIRECT_DESC, F_RING_INDIRECT_DESC | F_RING_PACKED])
def test_an_answer_without_a_request_ends_the_guest(library: ctypes.CDLL, features: int) -> None:
    with guest_ram() as (memory, start):
        ring = BareRing(library, memory, start, features, 8, 3)
        assert ring.poll() == -1
        queue_for(ring, features, 8).push(DescriptorChain(6, 1), 0)
        assert ring.poll() == GAVE_UP


@pytest.mark.parametrize("packed", [0, F_RING_PACKED])
def test_a_queue_that_is_too_small_is_refused(library: ctypes.CDLL, packed: int) -> None:
    with guest_ram() as (memory, start):
        BareRing(library, memory, start, packed | F_RING_INDIRECT_DESC, 4, 4)
        BareRing(library, memory, start, packed, 4 * MAX_PIECES, 4)
        with pytest.raises(ValueError, match="too few"):
            BareRing(library, memory, start, packed | F_RING_INDIRECT_DESC, 3, 4)
        with pytest.raises(ValueError, match="too few"):
            BareRing(library, memory, start, packed, 4 * MAX_PIECES - 1, 4)
