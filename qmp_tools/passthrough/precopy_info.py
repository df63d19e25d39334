"""L2 migrated while its device's estimates of its state are wrong.

QEMU asks the device how much state there is to read in PRE_COPY (VFIO_MIG_GET_PRECOPY_INFO), and
decides with the answer when to stop the guest. The answer is an estimate, so a wrong one may cost
time, but no page. There is no proof with an estimate that never fits in the downtime limit: QEMU
rightly never stops the guest then (docs/passthrough.md).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from .injected_faults import FAULTS
from .l2 import RAM_PAGES, Plan
from .l2_migration import migrate
from .outcome import Proof, repeated, retrying
from .tracking import TRACKINGS

_TOO_LARGE: Final = {"precopy_bytes": 1 << 30}
"""The real size is 4 KiB."""
_ESTIMATES: Final[Mapping[str, Mapping[str, int]]] = {
    "too large": _TOO_LARGE,
    "so large that their sum is 0": {"precopy_bytes": 1 << 63},
    "refused": {"precopy_errno": errno.EIO},
}
_DEVICE_LOG: Final = TRACKINGS["iommufd"]


def proofs(seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`."""
    found: dict[str, Proof] = {
        f"the device's estimates are {kind}": retrying(partial(_equal, estimates, timeout_s))
        for kind, estimates in _ESTIMATES.items()
    }
    found["the device's estimates are too large, control: drop"] = repeated(
        partial(_drops, timeout_s=timeout_s), seed, controls
    )
    return found


def _equal(estimates: Mapping[str, int], timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate, and check that all of RAM is equal, and that the device continues."""
    result = migrate(Plan((_DEVICE_LOG,), estimates), timeout_s)
    result.require_equal([_DEVICE_LOG])
    return f"0 of {RAM_PAGES} pages differ, {result}", result.figures()


def _drops(seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate with an injected fault as well, which must corrupt RAM, and only its own pages."""
    drop = FAULTS["drop"]
    result = migrate(Plan((_DEVICE_LOG,), {**_TOO_LARGE, **drop, "seed": seed}), timeout_s)
    return result.require_noticed(result.devices[0].dropped(drop["drop"], seed))
