"""Parse QEMU's RAM blocks, and know in which of them TCG loses pages that vCPUs write.

The human monitor's ``info ramblock`` prints the blocks, largest first. A block's offset is its
place among all RAM, by which QEMU counts dirty pages; the first block has offset 0. QEMU 7.2 prints
five columns. Newer versions add the host address and whether the block is read-only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.units import PAGE_BYTES

_HEADER: Final = re.compile(r" *Block Name +PSize +Offset +Used +Total(?: +HVA +RO)?")
_BLOCK: Final = re.compile(
    r" *(.*?) +([0-9.]+ (?:[KMGTPE]i)?B)  0x([0-9a-f]{16}) 0x([0-9a-f]{16}) 0x[0-9a-f]{16}"
    r"(?:  ?0x[0-9a-f]{16} +r[ow])?"
)
_WORD_BYTES: Final = 64 * PAGE_BYTES
"""The RAM that one word of QEMU's dirty bitmap covers."""
_RESETS_TLB: Final = (9, 0)
_SOUND_WITH_POSTCOPY: Final = (10, 0)
_LAST_KNOWN: Final = (11, 1)


@dataclass(frozen=True)
class RamBlock:
    """One RAM block; `offset` is its place among all RAM. Sizes in bytes."""

    name: str
    offset: int
    used_bytes: int


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """Parse the output of ``info ramblock`` into blocks, sorted by offset.

    Raises:
        UntestableError: `text` has another format.
    """
    header, *lines = text.splitlines() or [""]
    if not _HEADER.fullmatch(header):
        raise UntestableError(f"expected QEMU's RAM blocks ('info ramblock'), got {text[:80]!r}")
    blocks = []
    for line in filter(str.strip, lines):
        match = _BLOCK.fullmatch(line)
        if match is None:
            raise UntestableError(f"'info ramblock' has a line that is not a RAM block: {line!r}")
        blocks.append(RamBlock(match[1], int(match[3], 16), int(match[4], 16)))
    return sorted(blocks, key=lambda block: block.offset)


def block_of(region: str, blocks: Sequence[RamBlock]) -> RamBlock | None:
    """Return the block of the memory region with this name; None if the block is not certain.

    A device's block has the device's path before the region's name ('0000:00:01.0/vga.vram').
    """
    found = [block for block in blocks if block.name == region or block.name.endswith(f"/{region}")]
    return found[0] if len(found) == 1 else None


def known_tcg_loss(block: RamBlock, version: str, *, can_postcopy: bool = False) -> str | None:
    """Explain why QEMU of `version` ('7.2.22 …') may lose vCPUs' writes to `block` under TCG.

    `can_postcopy`: the capability postcopy-ram is on, whether or not postcopy begins.

    QEMU syncs whole words of the dirty bitmap only if the block's length is a multiple of 64 pages.
    Before 9.0, QEMU does not reset the TLB in this case; up to 11.1 it resets only the TLB entries
    of the block at offset 0. With postcopy-ram, QEMU 11.1 loses writes to any block; 10.0 does not.
    See docs/qemu-findings.md.

    Returns:
        The reason; None if no such loss is known.
    """
    major, minor = map(int, version.split(".")[:2])
    if can_postcopy and _SOUND_WITH_POSTCOPY < (major, minor) <= _LAST_KNOWN:
        return "the capability postcopy-ram is on"
    if block.used_bytes % _WORD_BYTES or (major, minor) > _LAST_KNOWN:
        return None
    if (major, minor) < _RESETS_TLB:
        return f"its size, {block.used_bytes // 1024} KiB, is a multiple of 256 KiB"
    if block.offset:
        return (
            f"its size, {block.used_bytes // 1024} KiB, is a multiple of 256 KiB, and it is not "
            "the first RAM block ('info ramblock')"
        )
    return None
