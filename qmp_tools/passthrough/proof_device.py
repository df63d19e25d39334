"""The fake VFIO device as the device of a proof, used by QEMU's own vfio-pci.

The device's journal is the ground truth, as with every built-in device. Only one link of the chain
after the journal is visible, the *tracker*: the device records which ranges it reported to the
kernel's iterator, and in which report. The links after the tracker are the kernel's and QEMU's, and
count as one: if a page was reported and did not arrive, QEMU lost it (or the kernel, on the way to
QEMU). If QEMU does not ask the device for dirty pages, the whole chain counts as QEMU's.

An epoch is one report: the next report after a write must contain the write.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import HARVEST, Evidence
from dmaproof.iova_bitmap import IovaRange
from dmaproof.journal import RECORD, WriteKind
from dmaproof.trace import TRACED_LINKS, PageEpochs
from dmaproof.units import PAGE_BYTES, div_ceil

from ..devices.device import AttachedDevice, DeviceFacts, ProofDevice
from .fake_device import FakeDevice, Journal, ReportedRanges, content, fake_device
from .tracking import TRACKINGS

NAME: Final = "vfio-fake"
_EVERY_EPOCH: Final = int(np.iinfo(np.uint32).max)


@dataclass(frozen=True)
class FakeProofDevice(ProofDevice):
    """The fake device; `tracking` is one of `TRACKINGS`, and the caller has injected `fault`."""

    tracking: str
    fault: str | None = None

    guests: ClassVar[Collection[str]] = (NAME,)

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(NAME, 0, tracker=self.tracking, fault=self.fault)

    @contextlib.asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        with contextlib.ExitStack() as stack:
            yield _AttachedFakeDevice(self.tracking, stack, timeout_s)


class _AttachedFakeDevice(AttachedDevice):
    def __init__(self, tracking: str, stack: contextlib.ExitStack, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._tracking = TRACKINGS[tracking]
        self._stack = stack
        self._devices: dict[str, FakeDevice] = {}

    async def attach(self, side: str) -> Sequence[str]:
        device = self._devices[side] = self._stack.enter_context(fake_device(self._timeout_s))
        return self._tracking.arguments(device.sysfs)

    async def evidence(self, side: str) -> Sequence[Evidence]:
        device = self._devices[side]
        reported = device.reported_ranges() if self._tracking.device else None
        return [evidence_of(device.journal(), reported)]


def evidence_of(journal: Journal, reported: ReportedRanges | None) -> Evidence:
    """Return the evidence of a device that wrote `journal` and reported `reported` to the kernel.

    The evidence has no memory slots. `reported` is None if QEMU does not ask the device for dirty
    pages; then the device's tracker has missed no page.
    """
    logged = np.flatnonzero(journal["logged"])
    if reported is not None and len(logged):
        journal = journal[logged[0] :]
    end = int((journal["iova"] + journal["length"]).max(initial=0))
    space = IovaRange(0, div_ceil(end, PAGE_BYTES) * PAGE_BYTES)
    seen = PageEpochs([space] if end else [])
    if reported is None:
        seen.see_many(journal["iova"], journal["length"], _EVERY_EPOCH)
    else:
        for report in np.unique(reported["report"]):
            of_report = reported[reported["report"] == report]
            seen.see_many(of_report["iova"], of_report["length"], int(report))
    return Evidence(
        slots=[],
        records=_records(journal),
        links=dict.fromkeys(TRACED_LINKS, seen),
        harvests=np.empty(0, dtype=HARVEST),
        started_ns=int(journal["time_ns"][0]) if len(journal) else None,
        requests=len(journal),
    )


def _records(journal: Journal) -> NDArray[np.void]:
    """Convert the device's journal to dmaproof's `RECORD`; each write counts as a request.

    Of writes to the same range, only the last one has a checksum: RAM has only its bytes.
    """
    records = np.zeros(len(journal), dtype=RECORD)
    for field, journal_field in (("request", "sequence"), ("gpa", "iova")):
        records[field] = journal[journal_field]
    for name in ("time_ns", "iova", "length"):
        records[name] = journal[name]
    records["epoch"] = journal["reports"] + 1
    records["kind"] = WriteKind.DATA
    last: dict[tuple[int, int], int] = {}
    for row, (iova, length) in enumerate(journal[["iova", "length"]].tolist()):
        last[iova, length] = row
    for (iova, length), row in last.items():
        records["checksum"][row] = zlib.crc32(_bytes(journal[row], iova, length))
    return records


def _bytes(entry: Any, iova: int, length: int) -> bytes:
    return content(int(entry["sequence"]), iova, length).tobytes()
