"""A guest's physical map as QEMU tells it: which memory region stands at which address.

QMP has no command for it; the human monitor's ``info mtree -f`` prints the flat view that vCPUs
see (softmmu's mtree_print_flatview), and ``gpa2hva`` where QEMU has a page mapped. Both have kept
their form from QEMU 7.2 to 11.1; what they print is read strictly, and refused when it is something
else.
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
    """A run of guest-physical addresses that one memory region answers.

    `offset` is where the run begins in the region. `kind` is QEMU's: 'ram', 'rom', 'romd', with
    'nv-' in front where the region is persistent memory; 'ramd' is a passed-through device's.
    """

    gpa: int
    length: int
    kind: str
    name: str
    offset: int = 0

    @property
    def is_ram(self) -> bool:
        """Whether it is memory that a migration carries."""
        return self.kind.removeprefix("nv-") in _RAM_KINDS

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gpa + self.length


def parse_flat_view(text: str) -> list[MapRegion]:
    """The regions of the system's memory, by address, from what ``info mtree -f`` prints.

    Raises:
        UntestableError: there is no such view in `text`, or something in it is not understood.
    """
    for view in text.replace("\r", "").split(_VIEW):
        if _SYSTEM_MEMORY.search(view):
            regions = [_region(line) for line in _REGION_LINE.findall(view)]
            for low, high in itertools.pairwise(regions):
                if high.gpa < low.end:
                    raise UntestableError(
                        f"QEMU's physical map has {high.name} at {high.gpa:#x}, where {low.name} "
                        f"still is"
                    )
            if regions:
                return regions
    raise UntestableError(
        "QEMU's physical map ('info mtree -f') has no view of the system's memory; is its human "
        "monitor built in?"
    )


def _region(line: str) -> MapRegion:
    match = _REGION.match(line)
    if match is None or int(match[1], 16) > int(match[2], 16):
        raise UntestableError(f"QEMU's physical map ('info mtree -f') has a strange line: {line!r}")
    first, last, kind, name, offset = match.groups(default="0")
    return MapRegion(
        gpa=int(first, 16),
        length=int(last, 16) + 1 - int(first, 16),
        kind=kind,
        name=name,
        offset=int(offset, 16),
    )


def parse_hva(text: str) -> int | None:
    """The host address that ``gpa2hva`` prints; None where there is no RAM."""
    match = _HVA.search(text)
    return int(match[1], 16) if match else None


@dataclass(frozen=True)
class CommonRange:
    """Guest-physical addresses at which both guests have RAM, each in one region of its own."""

    gpa: int
    length: int
    source: MapRegion
    destination: MapRegion


def common_ranges(
    source: Sequence[MapRegion], destination: Sequence[MapRegion]
) -> list[CommonRange]:
    """Both maps' RAM, cut where either has an edge.

    Raises:
        UntestableError: an address is RAM in only one of them.
    """
    maps = [[region for region in regions if region.is_ram] for regions in (source, destination)]
    edges = sorted({edge for regions in maps for it in regions for edge in (it.gpa, it.end)})
    ranges = []
    for low, high in itertools.pairwise(edges):
        ours, theirs = (
            next((region for region in regions if region.gpa <= low < region.end), None)
            for regions in maps
        )
        if ours and theirs:
            ranges.append(CommonRange(low, high - low, ours, theirs))
        elif ours or theirs:
            raise UntestableError(
                f"the physical maps differ: {low:#x} to {high - 1:#x} is "
                f"{ours.name if ours else 'no RAM'} at the source and "
                f"{theirs.name if theirs else 'no RAM'} at the destination; the guests are not "
                "two sides of one migration"
            )
    return ranges


def is_backend(region: MapRegion, name: str) -> bool:
    """Whether the region is memory backend `name`.

    Machine types up to 4.0, and libvirt's, name RAM by its path
    (x-use-canonical-path-for-ramblock-id).
    """
    return region.is_ram and region.name.removeprefix("/objects/") == name


def shown_parts(regions: Sequence[MapRegion], name: str) -> list[tuple[int, int, int]]:
    """Where backend `name` stands, as (GPA, offset, length), each as long as it goes on."""
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
    """The (offset, length) parts of backend `name`, of `size` bytes, that no region shows."""
    hidden = []
    position = 0
    shown = sorted((region.offset, region.length) for region in regions if is_backend(region, name))
    for offset, length in [*shown, (size, 0)]:
        if offset > position:
            hidden.append((position, offset - position))
        position = max(position, offset + length)
    return hidden
