"""Explain which virtio features of a guest a destination has refused.

A guest keeps the features that its driver has accepted. If the destination's device (QEMU's part
and the back end's together) does not offer all of them, QEMU refuses to load the device's state
(virtio_load). Its message names the features of the guest and the allowed features. QEMU 11.1
removes the features that are not allowed before it prints those of the guest
(virtio_set_features_nocheck), so its message does not name the missing feature.
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
"""Optional features of a device: their bits and virtio's names for them."""
_NAMES: Final = dict(FEATURES.values())


def explain_refusal(words: str, accepted: int | None) -> str | None:
    """Explain why the destination refused to load.

    Args:
        words: the messages of the destination's QEMU.
        accepted: the features (bits) that the guest's driver uses on the source, if known.

    Returns:
        None if `words` do not say that the cause is a virtio feature.
    """
    match = _REFUSAL.search(words)
    if match is None:
        return None
    named, allowed = (int(number, 16) for number in match.groups())
    missing = ((accepted or 0) | named) & ~allowed
    if not missing:
        return (
            "the guest uses a virtio feature that the destination's device does not offer; QEMU's "
            "message does not say which feature"
        )
    bits = [bit for bit in range(missing.bit_length()) if missing >> bit & 1]
    names = " and ".join(f"{_NAMES.get(bit, 'bit')} ({bit})" for bit in bits)
    hidden = "" if named & ~allowed else "; QEMU's message does not name the feature"
    return (
        f"the guest uses {names}, which the destination's device does not offer: QEMU must refuse "
        f"the migration{hidden}"
    )
