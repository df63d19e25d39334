"""Attribute each page that differs to the component that lost it.

The bytes that differ are looked up in the device's journal:

- The device wrote none of these bytes while dirty logging was on. The **accelerator** lost the
  page: QEMU tracks what its vCPUs write through the accelerator.
- The device wrote some of these bytes. The last such write should have been reported in a certain
  harvest. The first link of the chain (`dmaproof.trace.Link`) that did not see the page in that
  harvest or in a later one lost the page, and the **device** is to blame.
- Every link of dmaproof's chain saw the page. If the source still holds what the device wrote, the
  bit was in QEMU's log in time and QEMU did not send the page: **qemu** is to blame. If the source
  holds something else, a vCPU wrote there later, and the accelerator is to blame.

A device that keeps no journal gives none of this information, so the cause of a loss is unknown. In
two cases the device is certainly to blame even so: a page that was written after
the guest had been paused (`late_dma`), and a page whose dirty bit was in QEMU's log before its data
was in RAM (`migration.log_watch`). If a recorder has seen what the kernel logged, each page says
that too (`kernel_log`). The recorder does not see when the kernel wrote the page, so it names a
cause only for a page that it has withheld itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dmaproof.evidence import Evidence, Slot
from dmaproof.journal import WriteKind
from dmaproof.trace import TRACED_LINKS, Link
from dmaproof.units import PAGE_BYTES

from ..devices.vhost_recorder import KernelLog, KernelLogs
from ..memory.ram import RamFile
from ..migration.judgement import Blame
from ..migration.log_watch import LogEvidence


@dataclass(frozen=True)
class LostPage:
    """One page that differs. Addresses are in bytes.

    `gpa` is None if no memory slot contains the page. `bytes_differing` is None if the page was
    written only after the comparison. `kernel_log` is what the recorder of the kernel's log says
    about the page, if there is one.

    The members from `device` on describe the device's last write to the bytes that differ, and are
    None if there was no such write. `device` is the name of that device. `seconds` counts from the
    start of dirty logging.
    """

    ram_offset: int
    gpa: int | None
    bytes_differing: int | None
    blame: Blame
    link: Link | None = None
    device: str | None = None
    iova: int | None = None
    request: int | None = None
    queue: int | None = None
    kind: str | None = None
    seconds: float | None = None
    due_in_harvest: int | None = None
    last_seen_in_harvest: dict[str, int] = field(default_factory=dict)
    kernel_log: KernelLog | None = None


class WrittenPages:
    """The journal's records, indexed by the pages that they touch.

    `pages` (GPA page numbers, sorted) and `rows` (indices into the records) have one entry for each
    page of each record. The rows of one page are in the order of the writes.
    """

    def __init__(self, records: NDArray[np.void]) -> None:
        page_bytes = np.uint64(PAGE_BYTES)
        first = records["gpa"] // page_bytes
        last = (records["gpa"] + np.maximum(records["length"], 1) - np.uint64(1)) // page_bytes
        counts = (last - first + np.uint64(1)).astype(np.int64)
        rows = np.repeat(np.arange(len(records)), counts)
        position = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        pages = first[rows] + position.astype(np.uint64)
        order = np.argsort(pages, kind="stable")
        self.pages: NDArray[np.uint64] = pages[order]
        self.rows: NDArray[np.int64] = rows[order]

    def rows_of(self, page: int) -> NDArray[np.int64]:
        """Return the records that touch page number `page`, in the order of the writes."""
        low, high = np.searchsorted(
            self.pages, np.array((page, page + 1), dtype=np.uint64), side="left"
        )
        return self.rows[low:high]


def attribute(
    differing: NDArray[np.int64],
    source: RamFile,
    destination: RamFile,
    slots: Sequence[Slot],
    evidence: Sequence[Evidence],
    blame: Blame = Blame.UNKNOWN,
) -> list[LostPage]:
    """Attribute each of the `differing` pages (page numbers in the RAM files).

    `slots` are the guest's memory slots. Without any `evidence`, `blame` applies to every page.
    """
    slots = slots_in(source, slots)
    if not evidence:
        return [_unattributed(int(page), slots, source, destination, blame) for page in differing]
    written = [WrittenPages(each.records) for each in evidence]
    return [
        _attribute_page(int(page), slots, source, destination, evidence, written)
        for page in differing
    ]


def blame_early_bits(lost: Sequence[LostPage], log: LogEvidence) -> list[LostPage]:
    """Return the `lost` pages; blame the early bit of each page for which the `log` shows one."""
    early = set(log.early_bits)
    return [replace(page, blame=Blame.EARLY_BIT) if page.gpa in early else page for page in lost]


def blame_discarded_bits(lost: Sequence[LostPage], discarded: Collection[int]) -> list[LostPage]:
    """Return the `lost` pages; blame QEMU for those whose `discarded` bits it never read.

    `discarded` are page addresses in bytes (`Attempt.discarded_bits`).
    """
    return [replace(page, blame=Blame.QEMU) if page.gpa in discarded else page for page in lost]


def with_kernel_logs(lost: Sequence[LostPage], logs: KernelLogs) -> list[LostPage]:
    """Return the `lost` pages with what the recorder says; blame the fault for withheld pages."""
    found = []
    for page in lost:
        log = KernelLog.NEVER if page.gpa is None else logs.of(page.gpa)
        if log is KernelLog.WITHHELD:
            page = replace(page, blame=Blame.DEVICE, link=Link.LOG)
        found.append(replace(page, kernel_log=log))
    return found


def with_late_dma(lost: Sequence[LostPage], late: Sequence[LostPage]) -> list[LostPage]:
    """Merge the `lost` and the `late` pages without duplicates; a known cause takes precedence."""

    def place(page: LostPage) -> tuple[int, int | None]:
        return page.ram_offset, page.gpa

    late_places = {place(page) for page in late}
    others = [
        page for page in lost if page.blame is not Blame.UNKNOWN or place(page) not in late_places
    ]
    other_places = {place(page) for page in others}
    return [*others, *(page for page in late if place(page) not in other_places)]


def slots_in(ram: RamFile, slots: Sequence[Slot]) -> list[Slot]:
    """Return those of the `slots` that are parts of `ram`."""
    return [slot for slot in slots if (slot.device, slot.inode) == (ram.device, ram.inode)]


def _attribute_page(
    index: int,
    slots: Sequence[Slot],
    source: RamFile,
    destination: RamFile,
    journals: Sequence[Evidence],
    written: Sequence[WrittenPages],
) -> LostPage:
    ram_offset = index * PAGE_BYTES
    differs = differing_bytes(ram_offset, source, destination)
    bytes_differing = int(differs.sum())
    gpa = gpa_of(ram_offset, slots)
    if gpa is None:
        return LostPage(ram_offset, None, bytes_differing, Blame.ACCELERATOR)
    page = gpa // PAGE_BYTES
    lost = LostPage(ram_offset, gpa, bytes_differing, Blame.ACCELERATOR)
    last = [
        (record["time_ns"], record, evidence)
        for evidence, rows in zip(journals, written, strict=True)
        if (record := _last_write_of(differs, gpa, evidence.records, rows.rows_of(page)))
        is not None
    ]
    if not last:
        return lost
    _, record, evidence = max(last, key=lambda write: write[0])
    iova = int(record["iova"]) + max(0, gpa - int(record["gpa"]))
    due_epoch = int(record["epoch"])
    seen = {link: evidence.links[link].last(gpa) for link in TRACED_LINKS}
    link = next((link for link in TRACED_LINKS if seen[link] < due_epoch), Link.QEMU)
    blame = Blame.DEVICE
    if link == Link.QEMU:
        blame = Blame.QEMU if _source_still_holds(record, source, slots) else Blame.ACCELERATOR
    return LostPage(
        ram_offset=ram_offset,
        gpa=gpa,
        bytes_differing=bytes_differing,
        blame=blame,
        link=link if blame != Blame.ACCELERATOR else None,
        device=evidence.device or None,
        iova=iova,
        request=int(record["request"]),
        queue=int(record["queue"]),
        kind=WriteKind(int(record["kind"])).name.lower().replace("_", " "),
        seconds=(int(record["time_ns"]) - (evidence.started_ns or 0)) / 1e9,
        due_in_harvest=due_epoch,
        last_seen_in_harvest={link.value: epoch for link, epoch in seen.items()},
    )


def _unattributed(
    index: int, slots: Sequence[Slot], source: RamFile, destination: RamFile, blame: Blame
) -> LostPage:
    ram_offset = index * PAGE_BYTES
    bytes_differing = int(differing_bytes(ram_offset, source, destination).sum())
    return LostPage(ram_offset, gpa_of(ram_offset, slots), bytes_differing, blame)


def differing_bytes(ram_offset: int, source: RamFile, destination: RamFile) -> NDArray[np.bool_]:
    """Return for each byte of the page at `ram_offset` whether it differs."""
    sent, received = (
        np.frombuffer(ram.read(ram_offset, PAGE_BYTES), dtype=np.uint8)
        for ram in (source, destination)
    )
    differs: NDArray[np.bool_] = sent != received
    return differs


def gpa_of(ram_offset: int, slots: Sequence[Slot]) -> int | None:
    """Return the GPA of `ram_offset` in a RAM file; None if no slot contains that offset."""
    for slot in slots:
        if slot.file_offset <= ram_offset < slot.file_offset + slot.length:
            return slot.gpa + ram_offset - slot.file_offset
    return None


def _offset_of(gpa: int, slots: Sequence[Slot]) -> int | None:
    for slot in slots:
        if slot.gpa <= gpa < slot.gpa + slot.length:
            return slot.file_offset + gpa - slot.gpa
    return None


def _last_write_of(
    differs: NDArray[np.bool_], gpa: int, records: NDArray[np.void], rows: NDArray[np.int64]
) -> np.void | None:
    """Return the last of the writes `rows` to a byte that differs in the page at `gpa`."""
    for row in rows[::-1]:
        start = int(records["gpa"][row]) - gpa
        end = start + int(records["length"][row])
        if differs[max(0, start) : max(0, end)].any():
            record: np.void = records[row]
            return record
    return None


def _source_still_holds(record: np.void, source: RamFile, slots: Sequence[Slot]) -> bool:
    """Return whether the source's RAM holds exactly what the device wrote."""
    offset = _offset_of(int(record["gpa"]), slots)
    if offset is None:
        return False
    content = source.read(offset, int(record["length"]))
    return zlib.crc32(content) == int(record["checksum"])
