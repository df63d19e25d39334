"""The fake VFIO device as the device of a proof: QEMU's own vfio-pci has it, and tracks its pages.

Its journal is the ground truth, as with any device of ours. Of the chain behind it we see one link,
the *tracker*: what the kernel's iterator was told by the device, and in which report. The links
behind that are the kernel's and QEMU's, and stand for one: a page that was told and did not arrive
was lost by QEMU (or by the kernel on its way there). Where it is not the device that QEMU asks, all
of the chain is like that.

An epoch is a report here: a write is due in the next one.
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
from .fake_device import FakeDevice, Journal, Told, content, fake_device
from .tracking import TRACKINGS

NAME: Final = "vfio-fake"
_EVERY_EPOCH: Final = int(np.iinfo(np.uint32).max)


@dataclass(frozen=True)
class FakeProofDevice(ProofDevice):
    """`tracking` is one of `TRACKINGS`; `fault` has been injected by others."""

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
        told = device.told() if self._tracking.device else None
        return [evidence_of(device.journal(), told)]


def evidence_of(journal: Journal, told: Told | None) -> Evidence:
    """The evidence of a device that has written `journal`, and has told the iterator `told`.

    It has no slots. Without `told`, QEMU was not to ask the device: then no page is missed by a
    link of ours.
    """
    logged = np.flatnonzero(journal["logged"])
    if told is not None and len(logged):
        journal = journal[logged[0] :]
    end = int((journal["iova"] + journal["length"]).max(initial=0))
    space = IovaRange(0, div_ceil(end, PAGE_BYTES) * PAGE_BYTES)
    seen = PageEpochs([space] if end else [])
    if told is None:
        seen.see_many(journal["iova"], journal["length"], _EVERY_EPOCH)
    else:
        for report in np.unique(told["report"]):
            of_report = told[told["report"] == report]
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
    """The journal in the form of ours; a request is a write, by its number.

    Of ranges that were written again, only the last write has a checksum, for it alone can be found
    in RAM.
    """
    records = np.zeros(len(journal), dtype=RECORD)
    for ours, theirs in (("request", "sequence"), ("gpa", "iova")):
        records[ours] = journal[theirs]
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
