"""Requests in flight, recorded in shared memory that outlives the back end.

If a back end dies between taking a request and returning it, its driver would wait for ever. So
the back end records what is in flight in a file that the front end keeps: the front end asks for
such a file (GET_INFLIGHT_FD) and passes it to the next back end of the device (SET_INFLIGHT_FD).
The layout of each queue's region, for split and packed rings, and the order of the writes follow
the specification ("Inflight I/O tracking"). So the requests in flight are known at whichever moment
the process ends.

A region whose version is 0 is unused. The back end resets the version to 0 when the ring is
stopped properly, so a region that arrives with version 1 says that the previous process died.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Protocol

from .. import _core
from .._mapping import SharedMapping
from ..errors import ProtocolError
from ..units import div_ceil
from ..virtqueue import (
    DescriptorChain,
    PackedDescriptor,
    PackedVirtqueue,
    SplitVirtqueue,
    Virtqueue,
)
from .messages import InflightFile

_VERSION: Final = 1
_HEADER_BYTES: Final = 32
_ENTRY_BYTES: Final = 32
"""Sizes for a packed ring; the header and entries of a split ring are half as large."""
_ALIGNMENT: Final = 64
_LARGEST_RING_OF_QEMU: Final = 1024
"""VIRTQUEUE_MAX_SIZE: QEMU lets a driver make a ring this large, regardless of queue-size."""


def region_bytes(queue_size: int) -> int:
    """Return the bytes that one queue's region takes in the file, for either form of ring."""
    return div_ceil(_HEADER_BYTES + _ENTRY_BYTES * queue_size, _ALIGNMENT) * _ALIGNMENT


def make_file(queues: int, queue_size: int) -> tuple[int, InflightFile]:
    """Make a file for `queues` unused rings of `queue_size`; the caller owns the file descriptor.

    A driver may make its rings larger than the front end says: Linux on QEMU 10.0 makes rings of
    1024 on a device with a queue-size of 128, and SeaBIOS 1.16.3 makes rings of 256. So the file
    has space for rings of 1024.
    """
    size = queues * region_bytes(max(queue_size, _LARGEST_RING_OF_QEMU))
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, size)
    return fd, InflightFile(size, 0, queues, queue_size)


class InflightRegions:
    """The mapped file of all rings of a device; `fd` may be closed afterwards.

    Raises:
        ProtocolError: the file is shorter than the message says, or too short for its rings.
        OSError: the file cannot be mapped.
    """

    def __init__(self, fd: int, file: InflightFile) -> None:
        needed = file.queues * region_bytes(file.queue_size)
        available = os.fstat(fd).st_size
        if file.queues == 0 or file.size < needed or file.offset + file.size > available:
            raise ProtocolError(
                f"SET_INFLIGHT_FD: {file.queues} rings of {file.queue_size} need {needed} bytes, "
                f"got {file.size} bytes at offset {file.offset} of a file of {available}"
            )
        self._mapping = SharedMapping(fd, file.size, file.offset)
        self._bytes = memoryview(self._mapping)
        self.queues = file.queues
        self._part_bytes = file.size // file.queues // _ALIGNMENT * _ALIGNMENT

    def region(self, index: int, ring_size: int) -> memoryview | None:
        """Return the region of ring `index` with `ring_size` descriptors; None if it has none."""
        if index >= self.queues or region_bytes(ring_size) > self._part_bytes:
            return None
        return self._part(index)

    def _part(self, index: int) -> memoryview:
        return self._bytes[index * self._part_bytes : (index + 1) * self._part_bytes]

    @property
    def predecessor_died(self) -> bool:
        """Whether a process died while it served these rings."""
        return any(self._part(index)[8:10] != bytes(2) for index in range(self.queues))

    def check(self) -> None:
        """Check that the file has not been truncated.

        Raises:
            ProtocolError: the file became too short while it was mapped.
        """
        if self._mapping.lost:
            raise ProtocolError("the in-flight file was truncated while it was in use")


class _Region(Protocol):
    """One ring's region of the file, updated whenever a request is taken or returned."""

    def begin(self) -> None:
        """Record that the ring is being served."""

    def end(self) -> None:
        """Record that the ring was stopped properly."""

    def taken(self, chain: DescriptorChain) -> None:
        """Record a request that has just been taken."""

    def giving_back(self, chain: DescriptorChain) -> None:
        """Record a request that is about to be returned."""

    def given_back(self, chain: DescriptorChain) -> None:
        """Record that the driver has the request back."""


Found = list[Callable[[], DescriptorChain]]
"""One function for each request found in flight, in order; it reads the request when called.

Reading all at once could take too long for one turn, because the file's content is not trusted.
"""


@contextlib.contextmanager
def _refuse_invalid_content() -> Iterator[None]:
    """Turn errors of invalid content into ProtocolError: the front end may write at any time."""
    try:
        yield
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise ProtocolError(f"the in-flight region has invalid content: {error!r}") from error


class InflightVirtqueue:
    """A ring that records its requests in flight, and first returns those found in the region."""

    def __init__(self, queue: SplitVirtqueue | PackedVirtqueue, memory: memoryview) -> None:
        self._queue: Virtqueue = queue
        self._region: _Region
        with _refuse_invalid_content():
            if isinstance(queue, SplitVirtqueue):
                self._region, self._found = _split_region(queue, memory)
            else:
                self._region, self._found = _packed_region(queue, memory)
            self._region.begin()

    @property
    def size(self) -> int:
        return self._queue.size

    @property
    def base(self) -> int:
        return self._queue.base

    def pop(self) -> DescriptorChain | None:
        with _refuse_invalid_content():
            if self._found:
                found = self._found[0]()
                del self._found[0]
                return found
            chain = self._queue.pop()
            if chain is not None:
                self._region.taken(chain)
            return chain

    def push(self, chain: DescriptorChain, written: int) -> None:
        with _refuse_invalid_content():
            self._region.giving_back(chain)
        self._queue.push(chain, written)
        _core.fence()  # the driver must have the request before the region says so
        with _refuse_invalid_content():
            self._region.given_back(chain)

    def wants_interrupt(self) -> bool:
        return self._queue.wants_interrupt()

    def ask_for_kick(self) -> bool:
        return self._queue.ask_for_kick() or bool(self._found)

    def end(self) -> None:
        """Record that the ring is stopped with no request in flight."""
        self._region.end()


# Split rings ------------------------------------------------------------------------------------


class SplitRegion:
    """QueueRegionSplit and its DescStateSplit entries; this back end's batch is one request."""

    header: Final = struct.Struct(
        "<QHHHH"
    )  # features, version, desc_num, last_batch_head, used_idx
    entry: Final = struct.Struct("<B5xHQ")  # inflight, next, counter

    def __init__(self, queue: SplitVirtqueue, memory: memoryview, counter: int) -> None:
        self._queue = queue
        self._memory = memory
        self._counter = counter

    def begin(self) -> None:
        struct.pack_into("<H", self._memory, 14, self._queue.used_index)
        if self._memory[8:10] == bytes(2):
            struct.pack_into("<H", self._memory, 10, self._queue.size)
            struct.pack_into("<H", self._memory, 8, _VERSION)

    def end(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def taken(self, chain: DescriptorChain) -> None:
        offset = self.header.size + self.entry.size * chain.head
        struct.pack_into("<Q", self._memory, offset + 8, self._counter)
        self._counter += 1
        self._memory[offset] = 1

    def giving_back(self, chain: DescriptorChain) -> None:
        offset = self.header.size + self.entry.size * chain.head
        self._memory[offset + 6 : offset + 8] = self._memory[12:14]
        struct.pack_into("<H", self._memory, 12, chain.head)

    def given_back(self, chain: DescriptorChain) -> None:
        self._memory[self.header.size + self.entry.size * chain.head] = 0
        struct.pack_into("<H", self._memory, 14, self._queue.used_index)


def _split_region(queue: SplitVirtqueue, memory: memoryview) -> tuple[SplitRegion, Found]:
    _, version, size, last_batch_head, used_index = SplitRegion.header.unpack_from(memory)
    if version == 0:
        return SplitRegion(queue, memory, 0), []
    _check(version, size, queue.size)
    offsets = [SplitRegion.header.size + SplitRegion.entry.size * head for head in range(size)]
    if used_index != queue.used_index and last_batch_head < size:
        memory[offsets[last_batch_head]] = 0  # returned to the driver, but not recorded as such
    found = [
        (counter, head)
        for head, (inflight, _, counter) in enumerate(
            SplitRegion.entry.unpack_from(memory, offset) for offset in offsets
        )
        if inflight
    ]
    found.sort()
    chains: Found = [partial(queue.chain_at, head) for _, head in found]
    queue.resume_at(queue.used_index + len(found))
    return SplitRegion(queue, memory, found[-1][0] + 1 if found else 0), chains


# Packed rings -----------------------------------------------------------------------------------


class PackedRegion:
    """QueueRegionPacked and its DescStatePacked entries."""

    # features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, then both
    # wrap counters and 7 bytes of padding; the entries are aligned to 8 bytes.
    header: Final = struct.Struct("<QHHHHHHBB")
    # inflight, next, last, num, counter, id, flags, len, addr
    entry: Final = struct.Struct("<BxHHHQHHIQ")
    free_head_at, old_free_head_at, used_at, old_used_at = 12, 14, 16, 18
    wrap_at, old_wrap_at = 20, 21

    def __init__(self, queue: PackedVirtqueue, memory: memoryview) -> None:
        self._queue = queue
        self._memory = memory
        self._counter = 0
        self._heads: dict[int, int] = {}
        """Buffer ID of each request in flight → index of its first entry."""

    def _get(self, offset: int) -> int:
        value: int = struct.unpack_from("<H", self._memory, offset)[0]
        return value

    def _set(self, offset: int, value: int) -> None:
        struct.pack_into("<H", self._memory, offset, value)

    def _entry_at(self, index: int) -> int:
        return _HEADER_BYTES + self.entry.size * index

    def begin(self) -> None:
        if self._memory[8:10] != bytes(2):
            return  # keep the requests in flight that the region records
        size = self._queue.size
        index, wrap = self._queue.used_place
        self.header.pack_into(self._memory, 0, 0, 0, size, 0, 0, index, index, wrap, wrap)
        for number in range(size):
            self._set(self._entry_at(number) + 2, number + 1)
        self._set(8, _VERSION)

    def end(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def taken(self, chain: DescriptorChain) -> None:
        head = self._get(self.old_free_head_at)
        offset = self._entry_at(head)
        self._set(offset + 6, 0)
        struct.pack_into("<Q", self._memory, offset + 8, self._counter)
        self._counter += 1
        self._memory[offset] = 1
        for number, (iova, length, buffer_id, flags) in enumerate(chain.packed, 1):
            free = self._get(self.free_head_at)
            if number == len(chain.packed):
                self._set(offset + 4, free)
            self._set(offset + 6, number)
            struct.pack_into(
                "<HHIQ", self._memory, self._entry_at(free) + 16, buffer_id, flags, length, iova
            )
            self._set(self.free_head_at, self._get(self._entry_at(free) + 2))
        self._set(self.old_free_head_at, self._get(self.free_head_at))
        self._heads[chain.head] = head

    def giving_back(self, chain: DescriptorChain) -> None:
        head = self._heads[chain.head]
        last = self._get(self._entry_at(head) + 4)
        self._set(self._entry_at(last) + 2, self._get(self.free_head_at))
        self._set(self.free_head_at, head)
        index, wrap = self._queue.used_place_after(chain)
        self._set(self.used_at, index)
        self._memory[self.wrap_at] = wrap

    def given_back(self, chain: DescriptorChain) -> None:
        self._memory[self._entry_at(self._heads.pop(chain.head))] = 0
        self._commit()

    def _commit(self) -> None:
        self._memory[self.old_free_head_at : self.old_free_head_at + 2] = self._memory[12:14]
        self._memory[self.old_used_at : self.old_used_at + 2] = self._memory[16:18]
        self._memory[self.old_wrap_at] = self._memory[self.wrap_at]

    def recover(self) -> Found:
        """Repair the region, and return the requests in flight."""
        size = self._queue.size
        old_place = self._get(self.old_used_at), bool(self._memory[self.old_wrap_at])
        if old_place[0] >= size or self._get(self.used_at) >= size:
            raise ProtocolError(f"in-flight region: the used index is outside the ring of {size}")
        if self._get(self.used_at) != old_place[0] or (
            self._memory[self.wrap_at] != self._memory[self.old_wrap_at]
        ):
            if not self._queue.is_available_at(*old_place):
                self._commit()
            self._memory[12:14] = self._memory[14:16]
            self._memory[16:18] = self._memory[18:20]
            self._memory[self.wrap_at] = self._memory[self.old_wrap_at]
        self._set(self.free_head_at, self._get(self.old_free_head_at))
        for index in self._list_from(self._get(self.free_head_at), size):
            self._memory[self._entry_at(index)] = 0
        found = []
        for index in range(size):
            inflight, _, _, count, counter, *_ = self.entry.unpack_from(
                self._memory, self._entry_at(index)
            )
            if inflight:
                found.append((counter, index, count))
        found.sort()
        chains: Found = []
        taken = 0
        for counter, index, count in found:
            entries = self._list_from(index, count)
            taken += len(entries)
            if not entries or taken > size:
                raise ProtocolError(
                    f"in-flight region: the requests have {taken} descriptors, of which the last "
                    f"request has {len(entries)}; expected at least 1 for each request, and at "
                    f"most {size} in all"
                )
            descriptors = [self._descriptor(entry) for entry in entries]
            chains.append(partial(self._queue.chain_of, descriptors))
            self._heads[descriptors[-1].buffer_id] = index
            self._counter = counter + 1
        used_place = self._get(self.used_at), bool(self._memory[self.wrap_at])
        self._queue.resume_at(*used_place, taken)
        return chains

    def _descriptor(self, index: int) -> PackedDescriptor:
        *_, buffer_id, flags, length, iova = self.entry.unpack_from(
            self._memory, self._entry_at(index)
        )
        return PackedDescriptor(iova, length, buffer_id, flags)

    def _list_from(self, index: int, count: int) -> list[int]:
        """Follow the links from entry `index`, and return at most `count` entries."""
        linked: list[int] = []
        while index < self._queue.size and len(linked) < min(count, self._queue.size):
            linked.append(index)
            index = self._get(self._entry_at(index) + 2)
        return linked


def _packed_region(queue: PackedVirtqueue, memory: memoryview) -> tuple[PackedRegion, Found]:
    _, version, size, *_ = PackedRegion.header.unpack_from(memory)
    region = PackedRegion(queue, memory)
    if version == 0:
        return region, []
    _check(version, size, queue.size)
    return region, region.recover()


def _check(version: int, size: int, queue_size: int) -> None:
    if version != _VERSION or size != queue_size:
        raise ProtocolError(
            f"in-flight region: expected version {_VERSION} for a ring of {queue_size}, got "
            f"version {version} for a ring of {size}"
        )
