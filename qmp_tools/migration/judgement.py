"""What a proof can say of a difference, and from where it knows what a device wrote."""

from __future__ import annotations

from enum import StrEnum


class Blame(StrEnum):
    """Whose loss it was."""

    DEVICE = "device"
    QEMU = "qemu"
    ACCELERATOR = "accelerator"
    SNAPSHOT = "snapshot"
    UNKNOWN = "unknown"
    LATE_DMA = "late-dma"
    EARLY_BIT = "early-bit"


class EvidenceSource(StrEnum):
    """Who knows what a device wrote: its own journal, or only the guest that asked for it.

    STILL is the guest too, where it was paused before anything moved; SNAPSHOT where it ran on
    while a snapshot was taken.
    """

    JOURNAL = "journal"
    GUEST = "guest"
    STILL = "still"
    SNAPSHOT = "snapshot"
