"""The map of a guest's RAM, as runs of pages of one class, from which the reports draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Evidence, Slot
from dmaproof.units import PAGE_BYTES

from ..memory.physical_map import MapRegion, hidden_parts
from ..memory.ram import RamFile
from .attribution import LostPage, WrittenPages

_PROOF_CLASSES: Final = {
    "other": "not written by a device while dirty logging was on (the guest's CPUs may have "
    "written to the page; QEMU does not report that)",
    "device": "written by the device before every page of RAM had been sent once",
    "late": "written by the device after every page of RAM had been sent once, so that QEMU "
    "depends on the dirty bit to send it again",
    "lost": "differs on the destination",
}
_CLASSES_WITHOUT_JOURNAL: Final = {
    "other": "equal on both sides (the writer is unknown: the device keeps no journal)",
    "lost": _PROOF_CLASSES["lost"],
}


@dataclass(frozen=True)
class MapArea:
    """Consecutive pages of RAM. `classes` has one uint8 for each page.

    `gpa` is None for RAM that the guest's physical map hides. `offset` is that of the first page in
    memory region `region`.
    """

    region: str
    gpa: int | None
    offset: int
    classes: NDArray[np.uint8]


@dataclass(frozen=True)
class RamMap:
    """A map of RAM. `meanings` describes each class by its name; a class is an index into it."""

    meanings: dict[str, str]
    areas: Sequence[MapArea]

    def to_json(self) -> dict[str, Any]:
        """Return the map with its runs as [class, pages] pairs."""
        totals = sum(
            (np.bincount(area.classes, minlength=len(self.meanings)) for area in self.areas),
            np.zeros(len(self.meanings), dtype=np.int64),
        )
        return {
            "page_bytes": PAGE_BYTES,
            "classes": [
                {"name": name, "meaning": meaning, "pages": int(pages)}
                for (name, meaning), pages in zip(self.meanings.items(), totals, strict=True)
            ],
            "areas": [
                {
                    "region": area.region,
                    "gpa": area.gpa,
                    "offset": area.offset,
                    "pages": len(area.classes),
                    "runs": run_lengths(area.classes),
                }
                for area in self.areas
            ],
        }


def joined(maps: Sequence[RamMap]) -> RamMap:
    """Return one map of memory that consists of several files."""
    areas = [area for ram_map in maps for area in ram_map.areas]
    return RamMap(maps[0].meanings if maps else {}, areas)


def run_lengths(classes: NDArray[np.uint8]) -> list[list[int]]:
    """Return [class, pages] for each run of equal classes."""
    if not len(classes):
        return []
    edges = np.concatenate(([0], np.flatnonzero(np.diff(classes)) + 1, [len(classes)]))
    return [
        [int(kind), int(pages)]
        for kind, pages in zip(classes[edges[:-1]], np.diff(edges), strict=True)
    ]


def map_proof(
    slots: Sequence[Slot],
    evidence: Sequence[Evidence],
    lost: Sequence[LostPage],
    source: RamFile,
    all_sent_ns: int,
) -> RamMap:
    """Map a proof's RAM; by `all_sent_ns` (CLOCK_MONOTONIC) every page had been sent once."""
    meanings = _PROOF_CLASSES if evidence else _CLASSES_WITHOUT_JOURNAL
    names = list(meanings)
    slots = sorted(
        slot for slot in slots if (slot.device, slot.inode) == (source.device, source.inode)
    )
    classes = np.full(source.pages, names.index("other"), dtype=np.uint8)
    for kind, pages in _written(evidence, all_sent_ns):
        for slot in slots:
            inside = pages[(pages >= slot.gpa // PAGE_BYTES) & (pages < _end(slot) // PAGE_BYTES)]
            classes[inside + (slot.file_offset - slot.gpa) // PAGE_BYTES] = names.index(kind)
    for page in lost:
        classes[page.ram_offset // PAGE_BYTES] = names.index("lost")
    name = source.backend
    regions = [MapRegion(slot.gpa, slot.length, "ram", name, slot.file_offset) for slot in slots]
    places = [(region.gpa, region.offset, region.length) for region in regions]
    hidden = hidden_parts(regions, name, source.length)
    areas = [*places, *((None, offset, length) for offset, length in hidden)]
    return RamMap(
        meanings,
        [
            MapArea(name, gpa, offset, classes[offset // PAGE_BYTES :][: length // PAGE_BYTES])
            for gpa, offset, length in areas
        ],
    )


def with_lost(ram_map: RamMap, lost: Sequence[LostPage]) -> RamMap:
    """Return the map with more `lost` pages, found after it was made; those without a GPA are left
    out."""
    kind = list(ram_map.meanings).index("lost")
    areas = []
    for area in ram_map.areas:
        classes = area.classes.copy()
        for page in lost:
            if page.gpa is not None and area.gpa is not None:
                index = (page.gpa - area.gpa) // PAGE_BYTES
                if 0 <= index < len(classes):
                    classes[index] = kind
        areas.append(replace(area, classes=classes))
    return replace(ram_map, areas=areas)


def _written(evidence: Sequence[Evidence], all_sent_ns: int) -> list[tuple[str, NDArray[np.int64]]]:
    early, late = [], []
    for each in evidence:
        written = WrittenPages(each.records)
        is_late = each.records["time_ns"][written.rows] >= all_sent_ns
        early.append(("device", written.pages[~is_late].astype(np.int64)))
        late.append(("late", written.pages[is_late].astype(np.int64)))
    return early + late  # a late write of one device overrides early writes of others


def _end(slot: Slot) -> int:
    return slot.gpa + slot.length
