"""The evidence of a device process for the verdict: the journal, the trace and the memory slots.

The device process writes the evidence into a folder, and the process that compares the RAM reads
it. The file is a NumPy archive, so that millions of records need no conversion to text.
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from .collector import Collector
from .errors import UntestableError
from .guest_memory import GuestMemory
from .iova_bitmap import IovaRange
from .journal import RECORD, Journal
from .trace import TRACED_LINKS, Link, PageEpochs

_FILE: Final = "evidence.npz"

_NOT_WHOLE: Final = (
    *(OSError, EOFError, MemoryError, BadZipFile, zlib.error),
    *(KeyError, RuntimeError, TypeError, ValueError),
)
"""The exceptions that numpy and zipfile raise for a truncated or damaged file."""

HARVEST: Final = np.dtype(
    [
        ("epoch", "<u8"),
        ("time_ns", "<u8"),
        ("duration_ns", "<u8"),
        ("pages", "<u8"),
        ("merged", "<u8"),
    ]
)
"""See `dmaproof.collector.Harvest`."""


class Slot(NamedTuple):
    """A memory slot without its bytes: its place in the guest and in the backing file."""

    gpa: int
    length: int
    file_offset: int
    device: int
    inode: int


@dataclass(frozen=True)
class Evidence:
    """The evidence of one session; `device` names its device in a proof with several devices.

    `records` has the dtype `dmaproof.journal.RECORD`, and `harvests` the dtype `HARVEST`.
    `started_ns` is the time at which logging was switched on (CLOCK_MONOTONIC), None if it never
    was. `slots` is empty if the device does not know its memory slots.
    """

    slots: list[Slot]
    records: NDArray[np.void]
    links: dict[Link, PageEpochs]
    harvests: NDArray[np.void]
    started_ns: int | None
    requests: int
    device: str = ""

    def save(self, folder: Path) -> None:
        """Write the evidence into `folder`. After an error, earlier evidence is still whole."""
        arrays: dict[str, NDArray[Any]] = {
            "slots": np.array(self.slots, dtype=np.uint64).reshape(-1, len(Slot._fields)),
            "records": self.records,
            "harvests": self.harvests,
            "started_ns": np.array(self.started_ns or 0, dtype=np.uint64),
            "requests": np.array(self.requests, dtype=np.uint64),
        }
        for link, pages in self.links.items():
            arrays[f"{link}_ranges"] = np.array(pages.ranges, dtype=np.uint64).reshape(-1, 2)
            arrays[f"{link}_epochs"] = pages.array
        fresh = folder / f"new-{_FILE}"
        np.savez(fresh, allow_pickle=False, **arrays)
        fresh.replace(folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        """Read the evidence that `save` wrote.

        Raises:
            UntestableError: the file is missing or damaged.
        """
        try:
            return cls._load(folder)
        except _NOT_WHOLE as error:
            raise UntestableError(
                f"the device's evidence in {folder / _FILE} cannot be read: {error}"
            ) from error

    @classmethod
    def _load(cls, folder: Path) -> Evidence:
        with np.load(folder / _FILE) as arrays:
            links = {}
            for link in TRACED_LINKS:
                pages = PageEpochs(
                    IovaRange(*(int(number) for number in row)) for row in arrays[f"{link}_ranges"]
                )
                pages.array[:] = arrays[f"{link}_epochs"]
                links[link] = pages
            records, harvests = arrays["records"], arrays["harvests"]
            if (records.dtype, harvests.dtype) != (RECORD, HARVEST):
                raise ValueError(f"records of {records.dtype}, harvests of {harvests.dtype}")
            return cls(
                slots=[Slot(*(int(number) for number in row)) for row in arrays["slots"]],
                records=records,
                links=links,
                harvests=harvests,
                started_ns=int(arrays["started_ns"]) or None,
                requests=int(arrays["requests"]),
            )


def collect_evidence(
    journal: Journal,
    collector: Collector,
    memory: GuestMemory,
    *,
    requests: int,
) -> Evidence:
    """Return the evidence at this moment."""
    return Evidence(
        slots=[
            Slot(slot.gpa, slot.length, slot.file_offset, slot.device, slot.inode)
            for slot in memory.slots
        ],
        records=journal.records(),
        links=collector.trace.links,
        harvests=np.array(
            [astuple(harvest) for harvest in collector.harvests],
            dtype=HARVEST,
        ),
        started_ns=journal.started_ns,
        requests=requests,
    )
