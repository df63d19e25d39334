"""iommufd's dirty bitmap of a hardware page table against our iterator, bit for bit."""

from __future__ import annotations

import random
from typing import Any, Final

import numpy as np

from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.vfio.requests import bitmap_for
from dmaproof.vfio.trackers import HwptTracker

from .mock_iommu import APERTURE, mock_iommu
from .outcome import require

_PAGE: Final = 4096
_SIZES: Final = (2, 4, 16, 32, 80, 321, 4096)
"""Pages; what iommufd's own selftest takes, and one page more than words."""


def hwpt_cases(count: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Random dirty entries, read whole and in parts, with clearing and without."""
    choose = random.Random(seed)
    pages_told = 0
    for pages in _SIZES:
        with mock_iommu(pages * _PAGE) as mock:
            mock.iommufd.set_dirty_tracking(mock.hwpt, True)
            for case in range(max(1, count // len(_SIZES))):
                dirty = bitmap_for(pages * _PAGE, _PAGE)
                chosen = choose.sample(range(pages), choose.randint(0, min(pages, 200)))
                expected = bitmap_for(pages * _PAGE, _PAGE)
                with IovaBitmap(APERTURE, pages * _PAGE, _PAGE, expected) as bitmap:
                    for page in chosen:
                        bitmap.set(APERTURE + page * _PAGE, 1)
                        dirty[page // 64] |= np.uint64(1 << page % 64)
                mock.set_dirty(APERTURE, pages * _PAGE, _PAGE, dirty)
                kept = mock.iommufd.get_dirty_bitmap(
                    mock.hwpt, APERTURE, pages * _PAGE, _PAGE, clear=False
                )
                require(
                    bool(np.array_equal(kept, expected)), f"{pages} pages, case {case}: not equal"
                )
                cut = choose.randrange(1, pages)
                parts = np.zeros(pages, dtype=np.uint8)
                for low, high in ((0, cut), (cut, pages)):
                    bits = mock.iommufd.get_dirty_bitmap(
                        mock.hwpt, APERTURE + low * _PAGE, (high - low) * _PAGE, _PAGE
                    )
                    parts[low:high] = np.unpackbits(bits.view(np.uint8), bitorder="little")[
                        : high - low
                    ]
                require(
                    bool(np.array_equal(np.flatnonzero(parts), sorted(chosen))),
                    f"{pages} pages, case {case}, cut at {cut}: not equal",
                )
                rest = mock.iommufd.get_dirty_bitmap(mock.hwpt, APERTURE, pages * _PAGE, _PAGE)
                require(not rest.any(), f"{pages} pages, case {case}: not forgotten")
                pages_told += len(chosen)
    return (
        f"{count} cases, {pages_told} dirty entries: equal to the bit",
        {"cases": count, "pages": pages_told, "seed": seed},
    )


def hwpt_tracker_cases(count: int, seed: int) -> tuple[str, dict[str, Any]]:
    """The same by our protocol, with questions that are aligned to nothing."""
    choose = random.Random(seed)
    pages = 4096
    length = pages * _PAGE
    with mock_iommu(length) as mock:
        tracker = HwptTracker(mock.iommufd, mock.hwpt)
        tracker.start([IovaRange(APERTURE, length)], _PAGE)
        for case in range(count):
            chosen = choose.sample(range(pages), 100)
            dirty = bitmap_for(length, _PAGE)
            for page in chosen:
                dirty[page // 64] |= np.uint64(1 << page % 64)
            mock.set_dirty(APERTURE, length, _PAGE, dirty)
            found = bitmap_for(length, _PAGE)
            cut = choose.randrange(1, length)
            with IovaBitmap(APERTURE, length, _PAGE, found) as bitmap:
                tracker.read_and_clear(bitmap, APERTURE, cut)
                tracker.read_and_clear(bitmap, APERTURE + cut, length - cut)
            require(bool(np.array_equal(found, dirty)), f"case {case}, cut at {cut}: not equal")
            with IovaBitmap(APERTURE, length, _PAGE, found) as bitmap:
                tracker.read_and_clear(bitmap, APERTURE, length)
        tracker.stop()
    return f"{count} rounds, no page lost or made up", {"rounds": count, "seed": seed}
