"""Every exception that dmaproof raises on purpose.

::

    DmaproofError
    ├── UsageError          the caller's arguments are wrong (exit code 2)
    ├── UntestableError     the proof could not be carried out (exit code 3)
    │   ├── UnsupportedError    because a QEMU lacks, or refuses, what was asked for
    │   ├── RefusedError        because the device refused what a QEMU or its guest sent
    │   └── WaitTimeoutError    because something did not come in time
    ├── BitmapError         a range, page size or buffer that a dirty bitmap cannot take
    ├── TrackerError        a dirty tracker was asked for what it cannot do
    ├── MemoryAccessError   an address outside every memory slot or IOVA mapping
    │   └── IotlbMissError      so far: the IOMMU is to be asked
    └── ProtocolError       a vhost-user peer or a guest driver broke its specification

Each message says what was tried, on what, and what to do about it.
"""

from collections.abc import Sequence


def printable(text: str) -> str:
    """`text` without what a terminal would obey and XML cannot hold.

    It is for whatever a process or a guest that is not ours has printed. Lines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        it if it.isprintable() or it in "\n\t" else "\N{REPLACEMENT CHARACTER}" for it in text
    )


class DmaproofError(Exception):
    """The root of every error that dmaproof raises on purpose.

    Its message is printable: it may quote a process that is not ours.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class UsageError(DmaproofError):
    """The caller's arguments are wrong."""


class UntestableError(DmaproofError):
    """The proof could not be carried out; the message says why and what would help."""


class UnsupportedError(UntestableError):
    """A QEMU lacks what was asked for, or refuses it: nothing has failed."""


class RefusedError(UntestableError):
    """A device of dmaproof's refused what a QEMU or its guest sent; the message says what."""


class WaitTimeoutError(UntestableError):
    """A wait has reached its bound; the message says what for, how long, and who is to blame."""


class BitmapError(DmaproofError, ValueError):
    """A range, page size or buffer that a dirty bitmap cannot take; nothing was written."""


class TrackerError(DmaproofError):
    """A dirty tracker was asked for what it cannot do."""


class MemoryAccessError(DmaproofError):
    """An address outside every memory slot or IOVA mapping; nothing was written."""


class IotlbMissError(MemoryAccessError):
    """A device's IOTLB does not know some pages; `missing` are (IOVA, access), to be asked for."""

    def __init__(self, missing: Sequence[tuple[int, int]]) -> None:
        pages = ", ".join(f"{iova:#x}" for iova, _ in missing)
        super().__init__(f"the IOTLB does not know the pages at IOVA {pages}")
        self.missing = missing


class ProtocolError(DmaproofError):
    """A vhost-user peer or a guest driver broke its specification."""
