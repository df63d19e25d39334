"""The page size of the whole chain, and the division that rounds up to whole pages and words."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 4096
"""The size of a page in memory slots, IOMMU mappings, QEMU's dirty log and stamped pages.

It is 4 KiB on every architecture. The host's own page size is `mmap.PAGESIZE`, which may be larger.
"""


def div_ceil(dividend: int, divisor: int) -> int:
    """Divide and round up.

    Args:
        dividend: any integer.
        divisor: a positive integer.

    Returns:
        The smallest integer that is not less than the quotient.
    """
    return -(-dividend // divisor)
