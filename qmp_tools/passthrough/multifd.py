"""L2 migrated with multifd, whose channels also carry the device's state.

QEMU then reads the state in a thread of its own, and loads it in another one, while pages are sent
and received. The device's last dirty pages must arrive nevertheless.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from .injected_faults import FAULTS
from .l2 import RAM_PAGES, Plan
from .l2_migration import migrate
from .outcome import Proof, repeated, retrying
from .tracking import TRACKINGS, Tracking

_TRACKINGS: Final = ("iommufd", "container")


def proofs(seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`."""
    found: dict[str, Proof] = {
        f"multifd: {short}, device log": retrying(partial(_equal, TRACKINGS[short], timeout_s))
        for short in _TRACKINGS
    }
    found["multifd: iommufd, device log, control: drop"] = repeated(
        partial(_drops, timeout_s=timeout_s), seed, controls
    )
    return found


def _equal(tracking: Tracking, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate, and check that all of RAM is equal, and that the device continues."""
    result = migrate(Plan((tracking,), multifd=True), timeout_s)
    result.require_equal([tracking])
    return f"0 of {RAM_PAGES} pages differ, {result}", result.figures()


def _drops(seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate with an injected fault, which must corrupt RAM, and only its own pages."""
    faults = {**FAULTS["drop"], "seed": seed}
    result = migrate(Plan((TRACKINGS["iommufd"],), faults, multifd=True), timeout_s)
    return result.require_noticed(result.devices[0].dropped(faults["drop"], seed))
