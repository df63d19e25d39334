"""iommufd's dirty bitmap of a hardware page table compared with `IovaBitmap`, bit for bit."""

from __future__ import annotations

import random
from typing import Any, Final

import numpy as np

from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.units import PAGE_BYTES
from dmaproof.vfio.requests import bitmap_for
from dmaproof.vfio.trackers import HwptTracker

from .mock_iommu import APERTURE, mock_iommu
from .outcome import require

_SIZES: Final = (2, 4, 16, 32, 80, 321, 4096)
"""In pages: the sizes of iommufd's own selftest, and 321, which is one more than whole words."""


def hwpt_cases(count: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Set random dirty entries, and read them whole and in parts, with and without clearing."""
    choose = random.Random(seed)
    dirty_pages = 0
    for pages in _SIZES:
        with mock_iommu(pages * PAGE_BYTES) as mock:
            mock.iommufd.set_dirty_tracking(mock.hwpt, True)
            for case in range(max(1, count // len(_SIZES))):
                dirty = bitmap_for(pages * PAGE_BYTES, PAGE_BYTES)
                chosen = choose.sample(range(pages), choose.randint(0, min(pages, 200)))
                expected = bitmap_for(pages * PAGE_BYTES, PAGE_BYTES)
                with IovaBitmap(APERTURE, pages * PAGE_BYTES, PAGE_BYTES, expected) as bitmap:
                    for page in chosen:
                        bitmap.set(APERTURE + page * PAGE_BYTES, 1)
                        dirty[page // 64] |= np.uint64(1 << page % 64)
                mock.set_dirty(APERTURE, pages * PAGE_BYTES, PAGE_BYTES, dirty)
                uncleared = mock.iommufd.get_dirty_bitmap(
                    mock.hwpt, APERTURE, pages * PAGE_BYTES, PAGE_BYTES, clear=False
                )
                require(
                    bool(np.array_equal(uncleared, expected)),
                    f"{pages} pages, case {case}: the bitmaps differ",
                )
                cut = choose.randrange(1, pages)
                parts = np.zeros(pages, dtype=np.uint8)
                for low, high in ((0, cut), (cut, pages)):
                    bits = mock.iommufd.get_dirty_bitmap(
                        mock.hwpt,
                        APERTURE + low * PAGE_BYTES,
                        (high - low) * PAGE_BYTES,
                        PAGE_BYTES,
                    )
                    parts[low:high] = np.unpackbits(bits.view(np.uint8), bitorder="little")[
                        : high - low
                    ]
                require(
                    bool(np.array_equal(np.flatnonzero(parts), sorted(chosen))),
                    f"{pages} pages, case {case}, cut at page {cut}: the bitmaps differ",
                )
                rest = mock.iommufd.get_dirty_bitmap(
                    mock.hwpt, APERTURE, pages * PAGE_BYTES, PAGE_BYTES
                )
                require(
                    not rest.any(), f"{pages} pages, case {case}: the dirty bits were not cleared"
                )
                dirty_pages += len(chosen)
    return (
        f"{count} cases, {dirty_pages} dirty entries: all bits equal",
        {"cases": count, "pages": dirty_pages, "seed": seed},
    )


def hwpt_tracker_cases(count: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Do the same through the `DirtyTracker` protocol, in ranges of any alignment."""
    choose = random.Random(seed)
    pages = 4096
    length = pages * PAGE_BYTES
    with mock_iommu(length) as mock:
        tracker = HwptTracker(mock.iommufd, mock.hwpt)
        tracker.start([IovaRange(APERTURE, length)], PAGE_BYTES)
        for case in range(count):
            chosen = choose.sample(range(pages), 100)
            dirty = bitmap_for(length, PAGE_BYTES)
            for page in chosen:
                dirty[page // 64] |= np.uint64(1 << page % 64)
            mock.set_dirty(APERTURE, length, PAGE_BYTES, dirty)
            found = bitmap_for(length, PAGE_BYTES)
            cut = choose.randrange(1, length)
            with IovaBitmap(APERTURE, length, PAGE_BYTES, found) as bitmap:
                tracker.read_and_clear(bitmap, APERTURE, cut)
                tracker.read_and_clear(bitmap, APERTURE + cut, length - cut)
            require(
                bool(np.array_equal(found, dirty)), f"case {case}, cut at {cut}: the bitmaps differ"
            )
            with IovaBitmap(APERTURE, length, PAGE_BYTES, found) as bitmap:
                tracker.read_and_clear(bitmap, APERTURE, length)
        tracker.stop()
    return f"{count} rounds, no page missing or extra", {"rounds": count, "seed": seed}
