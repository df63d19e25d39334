"""Detect RAM that is the same part of one file on both sides: that it is equal proves nothing.

This is the case with x-ignore-shared, which does not migrate memory that both sides map, and with a
file that is only read. A file that the sides map privately is not shared: each side writes to its
own copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmaproof.errors import UntestableError

from ..memory.pages import PagedRam
from ..memory.physical_map import CommonRange, MapRegion


@dataclass(frozen=True)
class _FilePart:
    device: int
    inode: int
    start: int
    end: int

    def overlaps(self, other: _FilePart) -> bool:
        same_file = (self.device, self.inode) == (other.device, other.inode)
        return same_file and self.start < other.end and other.start < self.end


def is_same_memory(source: PagedRam, destination: PagedRam, common: CommonRange) -> bool:
    """Return whether both sides have a range in the same place of the same file.

    Raises:
        UntestableError: the destination has part of the range's memory at another address.
    """
    begin, end = common.gpa, common.gpa + common.length
    source_part = _file_part(source, common.source, begin, end)
    if source_part is None:
        return False
    if source_part == _file_part(destination, common.destination, begin, end):
        return True
    for region in destination.files:
        destination_part = _file_part(destination, region, region.gpa, region.end)
        if destination_part and destination_part.overlaps(source_part):
            raise UntestableError(
                f"the source's {common.source.name} and the destination's {region.name} are in "
                "the same part of a file, but at different guest addresses, so each QEMU writes to "
                "the other's RAM: give each side its own file or offset"
            )
    return False


def is_same_part(
    source: PagedRam, destination: PagedRam, regions: tuple[MapRegion, MapRegion], offset: int
) -> bool:
    """Return whether byte `offset` of a backend is in the same place of the same file.

    `regions` are regions of the backend in the maps of both sides.
    """
    places = [
        place and place._replace(offset=place.offset + offset - region.offset)
        for ram, region in zip((source, destination), regions, strict=True)
        for place in [ram.files.get(region)]
    ]
    return places[0] is not None and places[0] == places[1]


def _file_part(ram: PagedRam, region: MapRegion, begin: int, end: int) -> _FilePart | None:
    """Return the part of a file that backs the GPAs from `begin` up to `end` of `region`."""
    place = ram.files.get(region)
    if place is None:
        return None
    start = place.offset + begin - region.gpa
    return _FilePart(place.device, place.inode, start, start + end - begin)
