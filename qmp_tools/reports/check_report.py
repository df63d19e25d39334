"""A check as JSON for programs and as text for people; see `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from dmaproof.units import PAGE_BYTES

from ..proof.ram_map import MapArea, RamMap
from ..qemu.machine import MIB
from ..ram_check.guest import Side
from ..ram_check.outcome import IMAGE, Check, ComparedArea, Difference
from ..words import bytes_differ, counted
from .report import HEADINGS, SCHEMA_VERSION

_CHECK_CLASSES: Final = {
    "equal": "the same on both sides",
    "discarded": "differs, but the guest gave the page back on the source, so it may differ",
    "known": "differs, as this page is known to do after a correct migration",
    "undecided": "differs: the page was either lost, or given back by the guest",
    "differs": "differs between source and destination",
}
_RUNS_SHOWN: Final = 10


def to_json(check: Check) -> dict[str, Any]:
    """Return all findings of a check. Addresses and sizes in bytes, times in seconds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "check",
        "verdict": check.sentence,
        "exit_code": check.exit_code,
        "pages": check.pages,
        "pages_differing": check.differing,
        "pages_known_to_differ": check.known,
        "pages_discarded": check.discarded,
        "pages_undecided": check.undecided,
        "discarding_devices": list(check.discarders),
        "differences": [
            {**asdict(difference), "story": _story([difference])}
            for difference in check.differences
        ],
        "discarded": [asdict(run) for run in runs_of(check, "discarded")],
        "undecided": [asdict(run) for run in runs_of(check, "undecided")],
        "not_compared": [asdict(area) for area in check.not_compared],
        "notes": list(check.notes),
        "source": asdict(check.source),
        "destination": asdict(check.destination),
        "compare_s": check.compare_s,
        "ram_map": map_check(check).to_json(),
    }


def to_text(check: Check) -> str:
    """Return the outcome, the figures behind it, and the places of the differences."""
    lines = [
        f"{HEADINGS[check.exit_code]}: {check.sentence}",
        "",
        f"  source       {_describe(check.source)}",
        f"  destination  {_describe(check.destination)}",
        *(f"  note         {note}" for note in check.notes),
        *(
            f"  not compared {area.region} {area.offset:#x} to "
            f"{area.offset + area.length - 1:#x}: {area.why}"
            for area in check.not_compared
        ),
    ]
    unknown = [difference for difference in check.differences if difference.known is None]
    if unknown:
        runs = join_runs(unknown)
        lines += ["", f"pages that differ ({check.differing - check.known}):"]
        lines += [f"  {_story(run)}" for run in runs[:_RUNS_SHOWN]]
        if len(runs) > _RUNS_SHOWN or check.differing > len(check.differences):
            lines.append("  … and more (--json lists all)")
    devices = ", ".join(check.discarders)
    for kind, heading in (
        ("undecided", "pages either lost or given back by the guest"),
        ("discarded", "pages given back by the guest"),
    ):
        if found := runs_of(check, kind):
            pages = sum(run.pages for run in found)
            lines += ["", f"{heading} through {devices} ({pages}):"]
            lines += [f"  {_place(run)}" for run in found[:_RUNS_SHOWN]]
            if len(found) > _RUNS_SHOWN:
                lines.append("  … and more (--json lists all)")
    known = [difference for difference in check.differences if difference.known is not None]
    if known:
        lines += ["", "pages that are known to differ after a correct migration:"]
        lines += [f"  {_story([difference])}: {difference.why}" for difference in known]
    return "\n".join(lines)


@dataclass(frozen=True)
class PageRun:
    """A run of `pages` consecutive pages."""

    gpa: int | None
    region: str
    offset: int
    pages: int


def runs_of(check: Check, kind: str) -> list[PageRun]:
    """Return the runs of pages that are 'discarded' or 'undecided'."""
    runs = []
    for area in check.areas:
        numbers = {"discarded": area.discarded, "undecided": area.undecided}[kind]
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
            if len(run):
                start = int(run[0]) * PAGE_BYTES
                gpa = None if area.gpa is None else area.gpa + start
                runs.append(PageRun(gpa, area.region, area.offset + start, len(run)))
    return runs


def _place(run: PageRun) -> str:
    begin = run.offset if run.gpa is None else run.gpa
    last = begin + run.pages * PAGE_BYTES - 1
    return f"GPA {begin:#x} to {last:#x} ({run.region} +{run.offset:#x}): {run.pages} pages"


def join_runs(differences: Sequence[Difference]) -> list[list[Difference]]:
    """Group the differences into runs of consecutive pages of one region."""
    runs: list[list[Difference]] = []
    for difference in differences:
        if runs:
            last = runs[-1][-1]
            if last.region == difference.region and last.offset + PAGE_BYTES == difference.offset:
                runs[-1].append(difference)
                continue
        runs.append([difference])
    return runs


def _story(run: Sequence[Difference]) -> str:
    first, last = run[0], run[-1]
    if first.region == IMAGE:
        place = "at an offset"
    elif first.gpa is None or last.gpa is None:
        place = "in RAM that the physical map hides"
    elif len(run) == 1:
        place = f"GPA {first.gpa:#x}"
    else:
        place = f"GPA {first.gpa:#x} to {last.gpa + PAGE_BYTES - 1:#x}"
    region = f"{first.region} +{first.offset:#x}"
    if first.device:
        region += f", DIMM {first.device}"
    known_bytes = [
        difference.bytes_differing for difference in run if difference.bytes_differing is not None
    ]
    if len(known_bytes) < len(run):
        verb = "differs" if len(run) == 1 else "differ"
        amount = f"{counted(len(run), 'page')} {verb} (compared by digest)"
    else:
        amount = bytes_differ(sum(known_bytes))
        if len(run) > 1:
            amount += f" in {len(run)} pages"
    known = f" ({first.known})" if first.known else ""
    return f"{place} ({region}): {amount}{known}"


def _describe(side: Side) -> str:
    if not side.version:
        return f"image {side.address}, {round(side.in_place_bytes / MIB, 2):g} MiB"
    memory = [
        f"{round(length / MIB, 2):g} MiB {kind}"
        for length, kind in (
            (side.in_place_bytes, "read in place"),
            (side.copied_bytes, "copied from its process"),
            (side.saved_bytes, "saved by QEMU"),
        )
        if length
    ]
    read = ", ".join(memory)
    if side.snapshot:
        read = f"snapshot {side.snapshot} of {side.taken} on {side.host}"
    return f"QEMU {side.version}, process {side.pid}, {side.status}; {read}"


def map_check(check: Check) -> RamMap:
    """Map all that was compared; consecutive areas are joined."""
    names = list(_CHECK_CLASSES)
    known = {
        (difference.region, difference.offset)
        for difference in check.differences
        if difference.known
    }
    areas: list[MapArea] = []
    for area in check.areas:
        classes = np.full(area.pages, names.index("equal"), dtype=np.uint8)
        classes[area.differing] = names.index("differs")
        classes[area.discarded] = names.index("discarded")
        classes[area.undecided] = names.index("undecided")
        for page in area.differing if known else ():
            if (area.region, area.offset + int(page) * PAGE_BYTES) in known:
                classes[page] = names.index("known")
        if areas and _follows(areas[-1], area):
            last = areas.pop()
            joined = np.concatenate((last.classes, classes))
            areas.append(MapArea(last.region, last.gpa, last.offset, joined))
        else:
            areas.append(MapArea(area.region, area.gpa, area.offset, classes))
    return RamMap(_CHECK_CLASSES, areas)


def _follows(before: MapArea, area: ComparedArea) -> bool:
    length = len(before.classes) * PAGE_BYTES
    return (
        before.region == area.region
        and before.offset + length == area.offset
        and (None if before.gpa is None else before.gpa + length) == area.gpa
    )
