"""QEMU's RAM blocks, and in which of them its TCG is known to lose pages that vCPUs write.

``info ramblock`` of the human monitor prints the blocks, largest first. A block's offset is its
place among all RAM, by which QEMU counts dirty pages; the first block has offset 0, whatever it is.
QEMU 7.2 prints five columns, newer versions add the host address and whether it may be written.
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
"""What one word of QEMU's dirty bitmap stands for."""
_RESETS_TLB: Final = (9, 0)
_LAST_KNOWN: Final = (11, 1)


@dataclass(frozen=True)
class RamBlock:
    """One RAM block; `offset` is its place among all RAM. Sizes in bytes."""

    name: str
    offset: int
    used_bytes: int


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """The blocks that ``info ramblock`` prints, by offset.

    Raises:
        UntestableError: `text` is something else.
    """
    header, *lines = text.splitlines() or [""]
    if not _HEADER.fullmatch(header):
        raise UntestableError(f"expected QEMU's RAM blocks ('info ramblock'), found {text[:80]!r}")
    blocks = []
    for line in filter(str.strip, lines):
        match = _BLOCK.fullmatch(line)
        if match is None:
            raise UntestableError(f"'info ramblock' has a line that is not a RAM block: {line!r}")
        blocks.append(RamBlock(match[1], int(match[3], 16), int(match[4], 16)))
    return sorted(blocks, key=lambda block: block.offset)


def block_of(region: str, blocks: Sequence[RamBlock]) -> RamBlock | None:
    """The block that the memory region of that name is, or None where that is not certain.

    A device's block has the device's path before the region's name ('0000:00:01.0/vga.vram').
    """
    found = [it for it in blocks if it.name == region or it.name.endswith(f"/{region}")]
    return found[0] if len(found) == 1 else None


def known_tcg_loss(block: RamBlock, version: str) -> str | None:
    """Why QEMU of `version` ('7.2.22 …') may lose what vCPUs write to `block` under TCG.

    None where no such loss is known. See docs/kernel-findings.md: QEMU syncs whole words of the
    dirty bitmap only where the block's length is a multiple of 64 pages. Before 9.0 it does not
    reset the TLB then; up to 11.1 it resets only the TLB entries of the block at offset 0.
    """
    major, minor = map(int, version.split(".")[:2])
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
