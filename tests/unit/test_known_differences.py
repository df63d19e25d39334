"""The differences that are known to occur after a correct migration; any other is a loss."""

from __future__ import annotations

import numpy as np
import pytest

from qmp_tools.ram_check.known_differences import known_difference

FIRST, LAST = 0xE0000, 0xEF000
"""The first and the last page of the firmware's low memory."""


def name_of(gpa: int | None, offsets: list[int], accelerator: str = "kvm") -> str | None:
    known = known_difference(gpa, np.array(offsets), accelerator)
    return known.name if known else None


@pytest.mark.parametrize("gpa", [FIRST, LAST])
@pytest.mark.parametrize("offsets", [[0], [5], [0, 31], [32, 40, 63], [4064, 4095]])
def test_a_clock_that_kvm_writes_in_the_firmwares_memory_is_known(
    gpa: int, offsets: list[int]
) -> None:
    assert name_of(gpa, offsets) == "pvclock"


def test_without_kvm_nothing_writes_a_clock() -> None:
    assert name_of(FIRST, [0, 31], "other") is None


@pytest.mark.parametrize("gpa", [FIRST - 0x1000, LAST + 0x1000, None])
def test_a_clock_outside_the_firmwares_memory_is_a_loss(gpa: int | None) -> None:
    assert name_of(gpa, [0, 31]) is None


@pytest.mark.parametrize("offsets", [[31, 32], [0, 33, 34], [0, 1, 40], [0, 4095]])
def test_more_than_one_clock_is_a_loss(offsets: list[int]) -> None:
    assert name_of(FIRST, offsets) is None
