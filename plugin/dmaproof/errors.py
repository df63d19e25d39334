"""Every exception that dmaproof raises on purpose.

::

    DmaproofError
    ├── UsageError          the caller's arguments are wrong (exit code 2)
    ├── UntestableError     the proof could not be carried out (exit code 3)
    │   ├── UnsupportedError    because a QEMU does not support, or refuses, what was requested
    │   ├── RefusedError        because the device refused what a QEMU or its guest sent
    │   └── WaitTimeoutError    because something did not happen in time
    ├── BitmapError         a range, page size or buffer that a dirty bitmap cannot use
    ├── TrackerError        a dirty tracker cannot do what was requested
    ├── MemoryAccessError   an address outside every memory slot or IOVA mapping
    │   └── IotlbMissError      an address that the IOTLB has to request from the IOMMU first
    └── ProtocolError       a vhost-user peer or a guest driver broke its specification

Each message says what was tried, on which object, and what to do about the error.
"""

from collections.abc import Sequence


def printable(text: str) -> str:
    """Replace the characters of `text` that a terminal would obey or that XML cannot contain.

    Use it for the output of guests and third-party processes. Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


class DmaproofError(Exception):
    """The base class of every error that dmaproof raises on purpose.

    The message contains only printable characters, because it may quote a third-party process.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class UsageError(DmaproofError):
    """The caller's arguments are wrong."""


class UntestableError(DmaproofError):
    """The proof could not be carried out; the message says why, and what would help."""


class UnsupportedError(UntestableError):
    """A QEMU does not support, or refuses, what was requested; nothing has failed."""


class RefusedError(UntestableError):
    """A dmaproof device refused what a QEMU or its guest sent; the message says what."""


class WaitTimeoutError(UntestableError):
    """A wait timed out; the message names the awaited event, the timeout and the cause."""


class BitmapError(DmaproofError, ValueError):
    """A range, page size or buffer that a dirty bitmap cannot use; nothing was written."""


class TrackerError(DmaproofError):
    """A dirty tracker cannot do what was requested."""


class MemoryAccessError(DmaproofError):
    """An address outside every memory slot or IOVA mapping; nothing was written."""


class IotlbMissError(MemoryAccessError):
    """A device's IOTLB has no mapping for some pages; the device can request them.

    The attribute `missing` lists the pages as (IOVA, access) pairs.
    """

    def __init__(self, missing: Sequence[tuple[int, int]]) -> None:
        pages = ", ".join(f"{iova:#x}" for iova, _ in missing)
        super().__init__(f"the IOTLB has no mapping for the pages at IOVA {pages}")
        self.missing = missing


class ProtocolError(DmaproofError):
    """A vhost-user peer or a guest driver broke its specification."""
