"""A destination's last words tell whether it has refused the state of a device."""

from __future__ import annotations

import pytest

from qmp_tools.migration.state_refusal import is_refusal


@pytest.mark.parametrize(
    "words",
    [
        "error while loading state for instance 0x0 of device '0000:00:02.0/virtio-blk'",
        "loadvm failed during postcopy: -22: Failed to load vmstate of virtio-blk",
        # In postcopy of QEMU 11.1, the thread that loads RAM may be the first to end QEMU.
        "VQ 0 size 0x80 < last_avail_idx 0x3d8 - used_idx 0xc\n"
        "check_section_footer: Read section footer failed: -22\n"
        "loadvm failed during postcopy: -22: Section footer error, section_id: 1",
    ],
)
def test_a_refused_device_state_is_recognized(words: str) -> None:
    assert is_refusal(words)


@pytest.mark.parametrize(
    "words",
    [
        "error while loading state for instance 0x0 of device 'ram'",
        "loadvm failed during postcopy: -5: Section footer error, section_id: 1",
        "",
    ],
)
def test_other_ends_of_a_destination_are_no_refusals(words: str) -> None:
    assert not is_refusal(words)
