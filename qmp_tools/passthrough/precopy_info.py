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
from typing import Final

from .l2 import Plan
from .l2_proofs import drops, equal
from .outcome import Proof, repeated, retrying
from .tracking import TRACKINGS

_TOO_LARGE: Final = {"precopy_bytes": 1 << 30}
"""The real size is 4 KiB."""
_ESTIMATES: Final[Mapping[str, Mapping[str, int]]] = {
    "too large": _TOO_LARGE,
    "so large that their sum is 0": {"precopy_bytes": 1 << 63},
    "refused": {"precopy_errno": errno.EIO},
}
_DEVICE_LOG: Final = (TRACKINGS["iommufd"],)


def proofs(seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`."""
    found: dict[str, Proof] = {
        f"the device's estimates are {kind}": retrying(
            partial(equal, Plan(_DEVICE_LOG, estimates), timeout_s)
        )
        for kind, estimates in _ESTIMATES.items()
    }
    found["the device's estimates are too large, control: drop"] = repeated(
        partial(drops, Plan(_DEVICE_LOG, _TOO_LARGE), timeout_s=timeout_s), seed, controls
    )
    return found
