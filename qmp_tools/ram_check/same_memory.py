"""RAM that is the same bytes of the same file on both sides: equal by nature, so nothing is proved.

So it is with x-ignore-shared, which does not migrate what both sides map, and with a file that is
only read. Files that the sides map privately are not shared: each writes to copies of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmaproof.errors import UntestableError

from ..memory.guest_ram import GuestRam
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


def is_same_memory(source: GuestRam, destination: GuestRam, common: CommonRange) -> bool:
    """Whether both sides have a range in the same place of the same file.

    Raises:
        UntestableError: the destination has some of the range's memory at another address.
    """
    begin, end = common.gpa, common.gpa + common.length
    ours = _file_part(source, common.source, begin, end)
    if ours is None:
        return False
    if ours == _file_part(destination, common.destination, begin, end):
        return True
    for region in destination.shared:
        theirs = _file_part(destination, region, region.gpa, region.end)
        if theirs and theirs.overlaps(ours):
            raise UntestableError(
                f"the source has {common.source.name} in the same part of a file in which the "
                f"destination has {region.name} at another address, so each writes to the other's "
                "RAM: give each side a file or an offset of its own"
            )
    return False


def _file_part(ram: GuestRam, region: MapRegion, begin: int, end: int) -> _FilePart | None:
    """Where the guest-physical addresses from `begin` up to `end` of `region` stand in a file."""
    memory = ram.shared.get(region)
    if memory is None:
        return None
    start = memory.offset + begin - region.gpa
    return _FilePart(memory.device, memory.inode, start, start + end - begin)
