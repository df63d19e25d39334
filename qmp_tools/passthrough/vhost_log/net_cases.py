"""Random cases for vhost-net: rings, buffers and frames of any size and place.

The used ring has pages of its own, in which a page border falls on any entry, so the rest of the
memory tells buffers and used ring apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from dmaproof.units import PAGE_BYTES

from .abi import Feature
from .memory import GuestMemory, Region
from .net import ETHERNET_HEADER_BYTES, HEADER_BYTES, LARGEST_FRAME, NetDevice
from .ring import MOST_INDIRECT, Buffer, Layout, Ring

REGIONS: Final = (Region(16, 64), Region(80, 32), Region(200, 64))
"""The second region follows the first one in the guest's memory, but not in the process's."""
_DESCRIPTOR_PAGE: Final = 16
_AVAIL_PAGE: Final = 20
_USED_PAGE: Final = 22
_USED_PAGES: Final = 4
_TABLE_PAGE: Final = 26
_TABLE_PAGES: Final = 16
_BUFFER_PAGES: Final = ((44, 112), (200, 264))
"""First and last page, exclusive; the tables and rings are before them."""
_LARGEST_UNMERGED_FRAME: Final = 2000
_MOST_CHAINS: Final = 70
"""More than vhost-net's batch of 64 buffers (VHOST_NET_BATCH in drivers/vhost/net.c)."""
USED_BORDER_PAGE: Final = _USED_PAGE + 2


def layout(memory: GuestMemory, size: int, used: int) -> Layout:
    """Return a ring of `size` descriptors, at most 1024, whose used ring is at `used`."""
    return Layout(
        size,
        memory.bus(_DESCRIPTOR_PAGE),
        memory.bus(_AVAIL_PAGE),
        used,
        memory.bus(_TABLE_PAGE),
    )


def used_pages(memory: GuestMemory) -> frozenset[int]:
    """Return the guest pages of the used ring."""
    return memory.guest_pages(memory.bus(_USED_PAGE), _USED_PAGES * PAGE_BYTES)


@dataclass
class Totals:
    """What the rounds of all cases did."""

    rounds: int = 0
    chains: int = 0
    pages: int = 0
    unchanged: int = 0
    features: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Case:
    """The choices of one case."""

    size: int
    used: int
    start: int
    features: frozenset[Feature]

    @classmethod
    def random(cls, choose: random.Random, memory: GuestMemory, fixed: Iterable[Feature]) -> Case:
        """Choose a ring; the features are `fixed` and some of the others.

        With VIRTIO_F_IN_ORDER or an IOTLB the used ring is in one page, since the kernel does not
        log all of it otherwise (`net_findings`).
        """
        features = {*fixed, Feature.LOG_ALL}
        optional = (
            Feature.NET_MERGEABLE,
            Feature.NET_HEADER,
            Feature.INDIRECT,
            Feature.EVENT_INDEX,
        )
        features |= {feature for feature in optional if choose.random() < 0.5}
        size = choose.choice((16, 64, 128, 256))
        border = memory.bus(USED_BORDER_PAGE)
        length = 6 + 8 * size
        used = border - 4 * choose.randrange(1, length // 4)
        if Feature.IN_ORDER in features or memory.iotlb:
            used = border - PAGE_BYTES + 4 * choose.randrange((PAGE_BYTES - length) // 4)
        return cls(size, used, choose.randrange(65536), frozenset(features))


def buffers(choose: random.Random, memory: GuestMemory, lengths: Iterable[int]) -> list[Buffer]:
    """Return buffers of `lengths` anywhere in the pages for buffers; they may overlap."""
    found = []
    for length in lengths:
        first, last = choose.choice(_BUFFER_PAGES)
        place = choose.randrange((last - first) * PAGE_BYTES - length + 1)
        found.append(Buffer(memory.bus(first) + place, length))
    return found


def _lengths(choose: random.Random, capacity: int) -> list[int]:
    """Return `capacity` in up to `MOST_INDIRECT` parts."""
    cuts = sorted(choose.sample(range(1, capacity), choose.randrange(MOST_INDIRECT)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, capacity], strict=True)]


def fill(choose: random.Random, device: NetDevice, features: frozenset[Feature]) -> None:
    """Add chains and frames; now and then there are more frames than fit in the chains."""
    mergeable = Feature.NET_MERGEABLE in features
    smallest = 64 if mergeable else HEADER_BYTES + _LARGEST_UNMERGED_FRAME
    for _ in range(choose.randrange(1, _MOST_CHAINS)):
        lengths = _lengths(choose, choose.randrange(smallest, smallest + 3 * PAGE_BYTES))
        indirect = Feature.INDIRECT in features and choose.random() < 0.5
        if device.ring.free < (1 if indirect else len(lengths)):
            break
        device.ring.add(buffers(choose, device.memory, lengths), indirect=indirect)
    largest = LARGEST_FRAME if mergeable else _LARGEST_UNMERGED_FRAME
    for _ in range(choose.randrange(1, _MOST_CHAINS)):
        device.send(choose.randbytes(choose.randrange(ETHERNET_HEADER_BYTES, largest)))


def open_case(
    case: Case, memory: GuestMemory, *, logged: bool = True, timeout_s: float
) -> NetDevice:
    """Open a device for a case."""
    ring = Ring(memory, layout(memory, case.size, case.used), case.start)
    return NetDevice(memory, ring, case.features, logged=logged, timeout_s=timeout_s)
