"""The cost of access to a user's dirty bitmap: the question of the iova_bitmap's first review.

A dirty bitmap belongs to the process that asks for it, and the pages of a large bitmap cannot all
be pinned for long. The review discussed three strategies, which ``strategies.c`` implements: a
private bitmap that is copied as a whole, windows that are pinned piece by piece over the whole
range, and pinning on demand with the last window kept. They are compared with dmaproof's two: a
mapped bitmap, set atomically, and the same through a file of which one window is mapped at a time.

The costs are those that the review named: pages pinned (of a mapped file: pages mapped), bytes
moved besides the bits, and time. A pin costs no time in the three, so their times are lower bounds.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..iova_bitmap import IovaBitmap
from ..units import PAGE_BYTES, div_ceil
from . import strategies
from .patterns import MOST_REPORTS, Locality, Pattern
from .strategies import Sample

Words = NDArray[np.uint64]

GIB, TIB = 1 << 30, 1 << 40
GUEST_SIZES: Final = (GIB, 16 * GIB, 256 * GIB, TIB, 4 * TIB, 16 * TIB)
DENSITIES: Final = (1e-6, 1e-4, 1e-2, 1.0)

_BITMAP_PAGE_BITS: Final = PAGE_BYTES * 8


@dataclass(frozen=True)
class Cost:
    """The cost of one harvest: seconds (median), bitmap pages pinned or mapped, bytes moved.

    `scaled` is true if only `MOST_REPORTS` of the reports were measured and the cost of the others
    was computed from these.
    """

    seconds: float
    pins: int
    bytes: int
    scaled: bool


@dataclass(frozen=True)
class Row:
    """The costs of one pattern, by strategy."""

    pattern: Pattern
    costs: dict[str, Cost] = field(default_factory=dict)


@dataclass(frozen=True)
class _Bitmap:
    """A bitmap for the largest guest: a file, and its mapping."""

    fd: int
    bits: NDArray[np.uint8]

    def cleared(self, pages: int) -> NDArray[np.uint8]:
        """Return a clean bitmap for `pages` pages, in whole pages that are allocated."""
        piece = self.bits[: div_ceil(pages, _BITMAP_PAGE_BITS) * PAGE_BYTES]
        piece[:] = 0
        return piece


@contextmanager
def _bitmap(pages: int) -> Iterator[_Bitmap]:
    size = div_ceil(pages, _BITMAP_PAGE_BITS) * PAGE_BYTES
    fd = os.memfd_create("bench-bitmap", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        # The last array that refers to the mapping unmaps it.
        yield _Bitmap(fd, np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8))
    finally:
        os.close(fd)


Strategy = Callable[[_Bitmap, Pattern, Words], Sample]
"""A function that carries reports (page numbers) into a bitmap."""


def _copied(bitmap: _Bitmap, pattern: Pattern, pages: Words) -> Sample:
    return strategies.copied(bitmap.cleared(pattern.guest_pages), pages, np.ones_like(pages))


def _in_pieces(bitmap: _Bitmap, pattern: Pattern, pages: Words) -> Sample:
    return strategies.in_pieces(
        bitmap.cleared(pattern.guest_pages), np.sort(pages), np.ones_like(pages)
    )


def _on_demand(bitmap: _Bitmap, pattern: Pattern, pages: Words) -> Sample:
    return strategies.on_demand(bitmap.cleared(pattern.guest_pages), pages, np.ones_like(pages))


def _dmaproof(bitmap: _Bitmap, pattern: Pattern, pages: Words, *, windowed: bool) -> Sample:
    cleared = bitmap.cleared(pattern.guest_pages)
    iovas = pages * np.uint64(PAGE_BYTES)
    began_s = time.perf_counter()
    data = bitmap.fd if windowed else cleared
    with IovaBitmap(0, pattern.guest_bytes, PAGE_BYTES, data) as iterator:
        if len(pages):
            iterator.set_many(iovas, PAGE_BYTES)
        seconds = time.perf_counter() - began_s
        return seconds, 0.0, iterator.stats.pages if windowed else 0, 0


def _mapped(bitmap: _Bitmap, pattern: Pattern, pages: Words) -> Sample:
    return _dmaproof(bitmap, pattern, pages, windowed=False)


def _windowed(bitmap: _Bitmap, pattern: Pattern, pages: Words) -> Sample:
    return _dmaproof(bitmap, pattern, pages, windowed=True)


STRATEGIES: Final[dict[str, Strategy]] = {
    "copied": _copied,
    "in pieces": _in_pieces,
    "on demand": _on_demand,
    "dmaproof, mapped": _mapped,
    "dmaproof, windows": _windowed,
}


def measure(patterns: Iterable[Pattern], *, repeats: int = 3, seed: int = 1) -> Iterator[Row]:
    """Measure the cost of each pattern for each strategy; the strategies take turns.

    Of each pattern, at most `MOST_REPORTS` reports are carried. Another measurement gives the cost
    of a harvest without reports, and the rest is scaled in proportion.
    """
    patterns = list(patterns)
    with _bitmap(max(pattern.guest_pages for pattern in patterns)) as bitmap:
        for pattern in patterns:
            pages = pattern.pages(seed)
            bitmap.cleared(pattern.guest_pages)  # allocates its memory
            samples: dict[str, list[Sample]] = {name: [] for name in STRATEGIES}
            empty: dict[str, list[Sample]] = {name: [] for name in STRATEGIES}
            for _ in range(repeats):
                for name, strategy in STRATEGIES.items():
                    samples[name].append(strategy(bitmap, pattern, pages))
                    if pattern.reports > len(pages):
                        empty[name].append(strategy(bitmap, pattern, pages[:0]))
            yield Row(
                pattern,
                {
                    name: _cost(samples[name], empty[name], pattern.reports / len(pages))
                    for name in STRATEGIES
                },
            )


def _cost(samples: Sequence[Sample], empty: Sequence[Sample], factor: float) -> Cost:
    seconds = statistics.median(sample[0] for sample in samples)
    _, _, pins, moved = samples[0]
    if not empty:
        return Cost(seconds, pins, moved, scaled=False)
    # A strategy measures its fixed cost itself if that is most of the time; for the others it is
    # the cost without reports.
    fixed = statistics.median(
        sample[1] or none[0] for sample, none in zip(samples, empty, strict=True)
    )
    fixed_pins = empty[0][2]
    return Cost(
        fixed + max(0.0, seconds - fixed) * factor,
        fixed_pins + round((pins - fixed_pins) * factor),
        moved,
        scaled=True,
    )


def all_patterns(most_guest_bytes: int) -> list[Pattern]:
    """Return every density and locality at every guest size up to `most_guest_bytes`."""
    return [
        Pattern(size, density, locality)
        for locality in Locality
        for density in DENSITIES
        for size in GUEST_SIZES
        if size <= most_guest_bytes
    ]


def size_name(size: int) -> str:
    """Return a size in bytes as text, such as '16 TiB', '1 GiB' or '1984 MiB'."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size >> 20} MiB"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table of milliseconds, pins and bytes moved.

    A time that begins with ``~`` is scaled up from `MOST_REPORTS` reports.
    """
    names = list(STRATEGIES)
    lines = [
        "| dirty | density | guest | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | pins, in pieces | pins, on demand | pins, dmaproof, windows | copied, bytes |",
        "|---|---|---|" + "---:|" * (len(names) + 4),
    ]
    for row in rows:
        costs, pattern = row.costs, row.pattern
        times = [f"{'~' * cost.scaled}{cost.seconds * 1e3:.3g}" for cost in costs.values()]
        lines.append(
            f"| {pattern.locality} | {pattern.density:g} | {size_name(pattern.guest_bytes)} | "
            + " | ".join(times)
            + f" | {costs['in pieces'].pins} | {costs['on demand'].pins}"
            f" | {costs['dmaproof, windows'].pins} | {costs['copied'].bytes} |"
        )
    return "\n".join(lines)


__all__ = [
    "DENSITIES",
    "GUEST_SIZES",
    "MOST_REPORTS",
    "STRATEGIES",
    "Cost",
    "Row",
    "all_patterns",
    "measure",
    "size_name",
    "table",
]
