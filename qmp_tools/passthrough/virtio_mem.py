"""L2 migrated while its device writes memory of virtio-mem.

QEMU maps this memory for vfio-pci as it is plugged, and asks for the dirty pages of each plugged
part. QEMU 10.0 and 11.1 have a defect there (docs/qemu-findings.md), which the proofs describe. On
a QEMU without the defect, their outcome is `DefectAbsentError`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np

from ..host.process import ProcessDiedError
from .injected_faults import FAULTS
from .l2 import Plan
from .l2_migration import migrate
from .l2_result import Result
from .outcome import DefectAbsentError, NotSupportedError, Proof, repeated, require, retrying
from .tracking import TRACKINGS, Tracking

_SHORT: Final = ("iommufd", "container")
DEFECTS: Final = {
    short: f"virtio-mem: {short}, device log, pages are lost or QEMU crashes" for short in _SHORT
}
CONTROL: Final = "virtio-mem: iommufd, device log, control: drop"
_PLUGGED: Final = "pages of virtio-mem"


def proofs(seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`."""
    found = {
        name: retrying(partial(_loses_or_crashes, TRACKINGS[short], timeout_s))
        for short, name in DEFECTS.items()
    }
    return {**found, CONTROL: repeated(partial(_drops, timeout_s=timeout_s), seed, controls)}


def _loses_or_crashes(tracking: Tracking, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate. With the defect, what QEMU does is undefined."""
    try:
        result = migrate(Plan((tracking,), in_plugged_memory=True), timeout_s)
    except ProcessDiedError as error:
        return _crash(error), {"crashed": True}
    return _judged(result, tracking)


def _crash(error: ProcessDiedError) -> str:
    """Return how a QEMU was killed, and require that a signal killed it."""
    require(error.killed, str(error))
    return str(error).splitlines()[0]


def _judged(result: Result, tracking: Tracking) -> tuple[str, dict[str, Any]]:
    """Require that only pages of the device differ.

    Raises:
        DefectAbsentError: no page differs.
    """
    result.require_test()
    if not len(result.differing):
        result.require_equal([tracking])
        raise DefectAbsentError(f"this QEMU loses no {_PLUGGED}: 0 pages differ, {result}")
    written = result.devices[0].written()
    others = np.setdiff1d(result.differing, written)
    require(not len(others), f"{len(others)} pages differ that the device has not written")
    return (
        f"{len(result.differing)} of {len(written)} {_PLUGGED} differ, {result}",
        result.figures(),
    )


def _drops(seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate with an injected fault, which must corrupt only its own pages."""
    faults = {**FAULTS["drop"], "seed": seed}
    plan = Plan((TRACKINGS["iommufd"],), faults, in_plugged_memory=True)
    try:
        result = migrate(plan, timeout_s)
    except ProcessDiedError as error:
        raise NotSupportedError(
            f"without a fault, this QEMU crashes, too: {_crash(error)}"
        ) from error
    dropped = result.devices[0].dropped(faults["drop"], seed)
    others = np.setdiff1d(result.differing, dropped)
    if len(others):
        raise NotSupportedError(f"without a fault, this QEMU loses {_PLUGGED}, too: {len(others)}")
    return result.require_noticed(dropped)
