"""The virtio feature that a destination refused, even if QEMU does not name it."""

from __future__ import annotations

import pytest

from qmp_tools.migration.refused_features import explain_refusal

OLD = "Features 0x130001000 unsupported. Allowed features: 0x158001244"
NEW = (
    "Features 0x00000000000000000000000110001000 unsupported. "
    "Allowed features: 0x00000000000000000000000158001244"
)
ACCEPTED = 0x130001000


@pytest.mark.parametrize("accepted", [ACCEPTED, None])
def test_an_older_qemu_names_the_feature(accepted: int | None) -> None:
    reason = explain_refusal(OLD, accepted)
    assert reason is not None
    assert "VIRTIO_F_EVENT_IDX (29)" in reason
    assert "leaves" not in reason


def test_the_device_names_the_feature_that_a_newer_qemu_does_not() -> None:
    reason = explain_refusal(f"a line\nqemu: {NEW}\nanother", ACCEPTED)
    assert reason is not None
    assert "VIRTIO_F_EVENT_IDX (29)" in reason
    assert "QEMU's message does not name the feature" in reason


def test_without_the_device_the_feature_is_unknown() -> None:
    reason = explain_refusal(NEW, None)
    assert reason is not None
    assert "does not say which feature" in reason


def test_several_and_unknown_features_are_named_by_their_bits() -> None:
    reason = explain_refusal(NEW, ACCEPTED | 1 << 28 | 1 << 40)
    assert reason is not None
    assert "VIRTIO_F_EVENT_IDX (29) and bit (40)" in reason


def test_other_words_are_not_explained() -> None:
    assert explain_refusal("load of migration failed: Invalid argument", ACCEPTED) is None
