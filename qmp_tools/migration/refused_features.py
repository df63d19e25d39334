"""A destination that refuses the virtio features of a guest, and which of them it was.

A guest keeps the features that its driver has accepted. Where the destination's device (QEMU's part
and the back end's together) does not offer all of them, QEMU refuses to load (virtio_load), and
says which features the guest has and which are allowed. 11.1 names the guest's only after it has
left out what is not allowed (virtio_set_features_nocheck): each that is named is allowed then, and
the one that is missing is not named.
"""

from __future__ import annotations

import re
from typing import Final

_REFUSAL: Final = re.compile(
    r"Features 0x([0-9a-f]+) unsupported\. Allowed features: 0x([0-9a-f]+)"
)
FEATURES: Final = {
    "seg-max": (2, "VIRTIO_BLK_F_SEG_MAX"),
    "blk-size": (6, "VIRTIO_BLK_F_BLK_SIZE"),
    "flush": (9, "VIRTIO_BLK_F_FLUSH"),
    "mq": (12, "VIRTIO_BLK_F_MQ"),
    "indirect-desc": (28, "VIRTIO_F_INDIRECT_DESC"),
    "event-idx": (29, "VIRTIO_F_EVENT_IDX"),
}
"""Features that a device can do without: their bits and virtio's names for them."""
_NAMES: Final = dict(FEATURES.values())


def explain_refusal(words: str, accepted: int | None) -> str | None:
    """Why the destination refused to load, if `words` say that it was for a virtio feature.

    `accepted` are the features (bits) that the guest's driver uses at the source, if known.
    """
    match = _REFUSAL.search(words)
    if match is None:
        return None
    named, allowed = (int(number, 16) for number in match.groups())
    missing = ((accepted or 0) | named) & ~allowed
    if not missing:
        return (
            "the guest uses a virtio feature that the destination's device does not offer; QEMU's "
            "message leaves out which"
        )
    bits = [bit for bit in range(missing.bit_length()) if missing >> bit & 1]
    names = " and ".join(f"{_NAMES.get(bit, 'bit')} ({bit})" for bit in bits)
    hidden = "" if named & ~allowed else "; its message leaves that out"
    return (
        f"the guest uses {names}, which the destination's device does not offer: QEMU has to "
        f"refuse it{hidden}"
    )
