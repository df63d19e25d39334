"""Name the causes that a proof can give for a difference, and its evidence of device writes."""

from __future__ import annotations

from enum import StrEnum


class Blame(StrEnum):
    """The party to which a proof attributes a lost page."""

    DEVICE = "device"
    QEMU = "qemu"
    ACCELERATOR = "accelerator"
    SNAPSHOT = "snapshot"
    UNKNOWN = "unknown"
    LATE_DMA = "late-dma"
    EARLY_BIT = "early-bit"


class EvidenceSource(StrEnum):
    """The evidence of what a device wrote: the device's journal, or the guest that requested it.

    With STILL and SNAPSHOT the guest is the evidence too. STILL: the guest was paused before QEMU
    sent anything. SNAPSHOT: the guest continued while QEMU took a snapshot.
    """

    JOURNAL = "journal"
    GUEST = "guest"
    STILL = "still"
    SNAPSHOT = "snapshot"
