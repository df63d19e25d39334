"""Parse a guest's physical map as QEMU prints it: the memory region at each address.

QMP has no command for the map. The human monitor's ``info mtree -f`` prints the flat view that
vCPUs see (softmmu's mtree_print_flatview), and ``gpa2hva`` prints the host address of a page. The
format of both is the same from QEMU 7.2 to 11.1. The parser is strict, and refuses other formats.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError

_VIEW: Final = "FlatView #"
_SYSTEM_MEMORY: Final = re.compile(r'^ AS "memory", ', re.MULTILINE)
_REGION: Final = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]+)\): (.*?)"
    r"(?: @([0-9a-f]{16}))?(?: (?:KVM|kvm))?$",  # the accelerator that has the region as a slot
    re.MULTILINE,
)
_REGION_LINE: Final = re.compile(r"^  \S.*$", re.MULTILINE)
_HVA: Final = re.compile(r"is 0x([0-9a-f]+)\s*$")
_RAM_KINDS: Final = frozenset({"ram", "rom", "romd"})


@dataclass(frozen=True)
class MapRegion:
    """A range of guest-physical addresses that belongs to one memory region.

    `offset` is where the range begins in the region. `kind` is QEMU's: 'ram', 'rom' or 'romd', with
    the prefix 'nv-' for persistent memory; 'ramd' is the memory of a passed-through device.
    """

    gpa: int
    length: int
    kind: str
    name: str
    offset: int = 0

    @property
    def is_ram(self) -> bool:
        """Whether the region is memory that a migration sends."""
        return self.kind.removeprefix("nv-") in _RAM_KINDS

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.gpa + self.length


def parse_flat_view(text: str) -> list[MapRegion]:
    """Parse the regions of the system's memory, by address, from the output of ``info mtree -f``.

    Raises:
        UntestableError: `text` has no view of the system's memory, or has an unknown format.
    """
    for view in text.replace("\r", "").split(_VIEW):
        if _SYSTEM_MEMORY.search(view):
            regions = [_region(line) for line in _REGION_LINE.findall(view)]
            for low, high in itertools.pairwise(regions):
                if high.gpa < low.end:
                    raise UntestableError(
                        f"QEMU's physical map ('info mtree -f') is contradictory: {high.name} at "
                        f"{high.gpa:#x} overlaps {low.name}"
                    )
            if regions:
                return regions
    raise UntestableError(
        "QEMU's physical map ('info mtree -f') has no view of the system's memory; check that this "
        "QEMU is built with the human monitor"
    )


def _region(line: str) -> MapRegion:
    match = _REGION.match(line)
    if match is None or int(match[1], 16) > int(match[2], 16):
        raise UntestableError(
            f"QEMU's physical map ('info mtree -f') has a line in an unknown format: {line!r}"
        )
    first, last, kind, name, offset = match.groups(default="0")
    return MapRegion(
        gpa=int(first, 16),
        length=int(last, 16) + 1 - int(first, 16),
        kind=kind,
        name=name,
        offset=int(offset, 16),
    )


def parse_hva(text: str) -> int | None:
    """Parse the host address that ``gpa2hva`` prints; None if there is no RAM."""
    match = _HVA.search(text)
    return int(match[1], 16) if match else None


@dataclass(frozen=True)
class CommonRange:
    """A range of guest-physical addresses at which each of both guests has one RAM region."""

    gpa: int
    length: int
    source: MapRegion
    destination: MapRegion


def common_ranges(
    source: Sequence[MapRegion], destination: Sequence[MapRegion]
) -> list[CommonRange]:
    """Return the RAM of both maps, split at the boundaries of either map.

    Raises:
        UntestableError: an address is RAM in only one of the maps.
    """
    maps = [[region for region in regions if region.is_ram] for regions in (source, destination)]
    edges = sorted(
        {edge for regions in maps for region in regions for edge in (region.gpa, region.end)}
    )
    ranges = []
    for low, high in itertools.pairwise(edges):
        at_source, at_destination = (
            next((region for region in regions if region.gpa <= low < region.end), None)
            for regions in maps
        )
        if at_source and at_destination:
            ranges.append(CommonRange(low, high - low, at_source, at_destination))
        elif at_source or at_destination:
            raise UntestableError(
                f"the physical maps differ: {low:#x} to {high - 1:#x} is "
                f"{at_source.name if at_source else 'not RAM'} on the source and "
                f"{at_destination.name if at_destination else 'not RAM'} on the destination; check "
                "that the two QEMUs are the two sides of one migration"
            )
    return ranges


def is_backend(region: MapRegion, name: str) -> bool:
    """Return whether the region is the memory backend `name`.

    Machine types up to 4.0, and those that libvirt sets up, name RAM by the backend's path
    (x-use-canonical-path-for-ramblock-id).
    """
    return region.is_ram and region.name.removeprefix("/objects/") == name


def shown_parts(regions: Sequence[MapRegion], name: str) -> list[tuple[int, int, int]]:
    """Return the contiguous parts of backend `name` in the map, as (GPA, offset, length)."""
    parts: list[tuple[int, int, int]] = []
    for region in regions:
        if not is_backend(region, name):
            continue
        gpa, offset, length = parts[-1] if parts else (0, 0, 0)
        if parts and (gpa + length, offset + length) == (region.gpa, region.offset):
            parts[-1] = (gpa, offset, length + region.length)
        else:
            parts.append((region.gpa, region.offset, region.length))
    return parts


def hidden_parts(regions: Sequence[MapRegion], name: str, size: int) -> list[tuple[int, int]]:
    """Return the hidden parts of backend `name`, of `size` bytes, as (offset, length)."""
    hidden = []
    position = 0
    shown = sorted((region.offset, region.length) for region in regions if is_backend(region, name))
    for offset, length in [*shown, (size, 0)]:
        if position < min(offset, size):
            hidden.append((position, min(offset, size) - position))
        position = max(position, offset + length)
    return hidden
