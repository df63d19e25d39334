"""L2 migrated with multifd, whose channels also carry the device's state.

QEMU then reads the state in a thread of its own, and loads it in another one, while pages are sent
and received. The device's last dirty pages must arrive nevertheless.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from .l2 import Plan
from .l2_proofs import drops, equal
from .outcome import Proof, repeated, retrying
from .tracking import TRACKINGS

_TRACKINGS: Final = ("iommufd", "container")


def proofs(seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`."""
    plans = {short: Plan((TRACKINGS[short],), multifd=True) for short in _TRACKINGS}
    found: dict[str, Proof] = {
        f"multifd: {short}, device log": retrying(partial(equal, plan, timeout_s))
        for short, plan in plans.items()
    }
    found["multifd: iommufd, device log, control: drop"] = repeated(
        partial(drops, plans["iommufd"], timeout_s=timeout_s), seed, controls
    )
    return found
