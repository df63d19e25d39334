"""Pages that are known to differ after a correct migration, with the reason.

A difference is recognized only if both its place and its form match, and it is always shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FIRMWARE_LOW_MEMORY: Final = range(0xE0000, 0xF0000)
PLACES: Final = (_FIRMWARE_LOW_MEMORY,)
"""Guest-physical addresses at which a known difference may be."""
_PVCLOCK_BYTES: Final = 32
"""sizeof(struct pvclock_vcpu_time_info), and its alignment."""


@dataclass(frozen=True)
class KnownDifference:
    """A known difference; `fits(gpa, differs, accelerator)` recognizes it.

    `differs` are the offsets in the page of the bytes that differ.
    """

    name: str
    why: str
    fits: Callable[[int, NDArray[np.int64], str], bool]


def _is_pvclock(gpa: int, differs: NDArray[np.int64], accelerator: str) -> bool:
    return (
        accelerator == "kvm"
        and gpa in _FIRMWARE_LOW_MEMORY
        and int(differs[0]) // _PVCLOCK_BYTES == int(differs[-1]) // _PVCLOCK_BYTES
    )


KNOWN_DIFFERENCES: Final = (
    KnownDifference(
        "pvclock",
        "the firmware registered this page as a clock page (kvmclock), to which KVM on each host "
        "writes its own time without QEMU; the guest expects this. '-cpu …,-kvmclock' removes the "
        "difference",
        _is_pvclock,
    ),
)


def known_difference(
    gpa: int | None, differs: NDArray[np.int64], accelerator: str
) -> KnownDifference | None:
    """Return the known difference of the page at `gpa`, if it has one.

    `differs` are the offsets in the page of the bytes that differ, at least one, sorted.
    """
    if gpa is None:
        return None
    return next(
        (known for known in KNOWN_DIFFERENCES if known.fits(gpa, differs, accelerator)), None
    )
