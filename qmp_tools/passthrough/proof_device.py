"""The fake VFIO device as the device of a proof, used by QEMU's own vfio-pci.

The device's journal is the ground truth, as with every built-in device. Only one link of the chain
after the journal is visible, the *tracker*: the device records which ranges it reported to the
kernel's iterator, and in which report. The links after the tracker are the kernel's and QEMU's, and
count as one: if a page was reported and did not arrive, QEMU lost it (or the kernel, on the way to
QEMU). If QEMU does not ask the device for dirty pages, the whole chain counts as QEMU's.

An epoch is one report: the next report after a write must contain the write. No report contains
what the device writes after it was stopped, so the device is to blame for such a write.
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
from .fake_device import (
    Addresses,
    FakeDevice,
    Journal,
    ReportedRanges,
    content,
    fake_device,
    was_stopped,
)
from .tracking import TRACKINGS

NAME: Final = "vfio-fake"
_NO_EPOCH: Final = int(np.iinfo(np.uint32).max)
_EVERY_EPOCH: Final = _NO_EPOCH - 1
_FIRST_IOVA: Final = 64 << 30
_REVERSED: Final = 0xFF000
"""Behind a vIOMMU, as in guests/passthrough/guest/iova.c: the IOVA of block 0, and the bits of an
address that are inverted."""


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
        return [evidence_of(device.journal(), reported, viommu=self._tracking.viommu)]


def is_behind_viommu(device: ProofDevice) -> bool:
    """Return whether the device is a fake one behind a vIOMMU, so that its guest must map RAM."""
    return isinstance(device, FakeProofDevice) and TRACKINGS[device.tracking].viommu


def gpas_of(iovas: Addresses) -> Addresses:
    """Return the guest-physical addresses that the guest has mapped at IOVAs (iova.c)."""
    return (iovas - np.uint64(_FIRST_IOVA)) ^ np.uint64(_REVERSED)


def evidence_of(
    journal: Journal, reported: ReportedRanges | None, *, viommu: bool = False
) -> Evidence:
    """Return the evidence of a device that wrote `journal` and reported `reported` to the kernel.

    The evidence has no memory slots. `reported` is None if QEMU does not ask the device for dirty
    pages; then the device's tracker has missed no page. Behind a `viommu` that is always so, as
    QEMU refuses to ask the device there.
    """
    assert reported is None or not viommu
    logged = np.flatnonzero(journal["logged"])
    if reported is not None and len(logged):
        journal = journal[logged[0] :]
    gpas = gpas_of(journal["iova"]) if viommu else journal["iova"]
    end = int((gpas + journal["length"]).max(initial=0))
    space = IovaRange(0, div_ceil(end, PAGE_BYTES) * PAGE_BYTES)
    seen = PageEpochs([space] if end else [])
    if reported is None:
        seen.see_many(gpas, journal["length"], _EVERY_EPOCH)
    else:
        for report in np.unique(reported["report"]):
            of_report = reported[reported["report"] == report]
            seen.see_many(of_report["iova"], of_report["length"], int(report))
    return Evidence(
        slots=[],
        records=_records(journal, gpas),
        links=dict.fromkeys(TRACED_LINKS, seen),
        harvests=np.empty(0, dtype=HARVEST),
        started_ns=int(journal["time_ns"][0]) if len(journal) else None,
        requests=len(journal),
    )


def _records(journal: Journal, gpas: Addresses) -> NDArray[np.void]:
    """Convert the device's journal to dmaproof's `RECORD`; each write counts as a request.

    Of writes to the same range, only the last one has a checksum: RAM has only its bytes.
    """
    records = np.zeros(len(journal), dtype=RECORD)
    records["request"] = journal["sequence"]
    records["gpa"] = gpas
    for name in ("time_ns", "iova", "length"):
        records[name] = journal[name]
    records["epoch"] = journal["reports"] + 1
    records["epoch"][was_stopped(journal)] = _NO_EPOCH
    records["kind"] = WriteKind.DATA
    last: dict[tuple[int, int], int] = {}
    for row, (iova, length) in enumerate(journal[["iova", "length"]].tolist()):
        last[iova, length] = row
    for (iova, length), row in last.items():
        records["checksum"][row] = zlib.crc32(_bytes(journal[row], iova, length))
    return records


def _bytes(entry: Any, iova: int, length: int) -> bytes:
    return content(int(entry["sequence"]), iova, length).tobytes()
