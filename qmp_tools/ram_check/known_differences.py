"""Pages that differ after a sound migration, and why; each is recognised by what stands in it.

A difference is named by one of these only where its place and its form both fit, and it is always
shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FIRMWARE_LOW_MEMORY: Final = range(0xE0000, 0xF0000)
_PVCLOCK_BYTES: Final = 32
"""sizeof(struct pvclock_vcpu_time_info), and its alignment."""


@dataclass(frozen=True)
class KnownDifference:
    """`fits(gpa, differs, accelerator)` tells it from the offsets of the bytes that differ."""

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
        "the firmware registered a clock page here (kvmclock), and each host's KVM writes its own "
        "time to it without QEMU; the guest expects that. '-cpu …,-kvmclock' takes it away",
        _is_pvclock,
    ),
)


def known_difference(
    gpa: int | None, differs: NDArray[np.int64], accelerator: str
) -> KnownDifference | None:
    """Which of the known differences the page at `gpa` has, if any.

    `differs` are the offsets in the page of the bytes that differ, sorted, at least one.
    """
    if gpa is None:
        return None
    return next(
        (known for known in KNOWN_DIFFERENCES if known.fits(gpa, differs, accelerator)), None
    )
