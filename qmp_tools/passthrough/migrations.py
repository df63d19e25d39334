"""L2 with one device, migrated by each way of tracking; and the proofs of the whole group.

Each way of tracking is followed by controls: the same migration with an injected fault of the
module. A control must corrupt RAM, and only pages that the fault withheld from the report.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

from . import multifd, precopy_info, two_devices, unplug, viommu, virtio_mem
from .injected_faults import FAULTS
from .l2 import Plan
from .l2_migration import migrate
from .l2_proofs import equal
from .outcome import Proof, repeated, require, retrying
from .tracking import TRACKINGS, Tracking

NAMES: Final = {
    "iommufd, device log": "iommufd",
    "iommufd, device log once stopped": "iommufd-once-stopped",
    "container, device log": "container",
    "container, device log once stopped": "container-once-stopped",
    "container, type1's log": "container-type1",
}
UNTRACKED: Final = "iommufd, nothing tracks"


def proofs(
    guest: Path, seed: int, timeout_s: float, controls: int = 1, *, quick: bool = False
) -> dict[str, Proof]:
    """Return the proofs of the group, each followed by its controls.

    `guest` is the ELF that drives the fake device. Each control is repeated `controls` times; if
    `quick`, each way of tracking has one control. `timeout_s` bounds each wait.
    """
    return {
        **_of_one_device(seed, timeout_s, controls, quick=quick),
        **two_devices.proofs(seed, timeout_s, controls, quick=quick),
        **unplug.proofs(seed, timeout_s, controls),
        **viommu.proofs(guest, seed, timeout_s, controls),
        **multifd.proofs(seed, timeout_s, controls),
        **precopy_info.proofs(seed, timeout_s, controls),
        **virtio_mem.proofs(seed, timeout_s, controls),
    }


def _of_one_device(seed: int, timeout_s: float, controls: int, *, quick: bool) -> dict[str, Proof]:
    found: dict[str, Proof] = {}
    for name, short in NAMES.items():
        tracking = TRACKINGS[short]
        found[name] = retrying(partial(equal, Plan((tracking,)), timeout_s))
        if tracking.device:
            # All faults with the first way; the others have only the fault whose pages are known.
            faults = FAULTS if tracking == Tracking() and not quick else ("drop",)
            for fault in faults:
                found[f"{name}, control: {fault}"] = repeated(
                    partial(_corrupts, tracking, fault, timeout_s=timeout_s), seed, controls
                )
    found[UNTRACKED] = retrying(partial(_untracked, timeout_s))
    return found


def _untracked(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate with iommufd and no tracker; require a warning of QEMU if pages are lost."""
    result = migrate(Plan((Tracking(device=False),)), timeout_s)
    result.require_test()
    require(
        result.warned or not len(result.differing),
        f"{len(result.differing)} pages differ, and QEMU did not warn, {result}",
    )
    warned = "QEMU warned" if result.warned else "no warning"
    return f"{warned}; {len(result.differing)} pages differ, {result}", result.figures()


def _corrupts(
    tracking: Tracking, fault: str, seed: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """Migrate with an injected fault, which must corrupt RAM, and only its own pages."""
    parameters = FAULTS[fault]
    result = migrate(Plan((tracking,), {**parameters, "seed": seed}), timeout_s)
    device = result.devices[0]
    dropped = device.dropped(parameters["drop"], seed) if fault == "drop" else device.written()
    return result.require_noticed(dropped)
