"""Huge pages of 2 MiB, reserved for a test and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_FOLDER: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@contextlib.contextmanager
def reserved(count: int) -> Iterator[None]:
    """Have at least `count` free huge pages until the context ends; skip the test if it cannot.

    Only one process may do this at a time.
    """
    number = _FOLDER / "nr_hugepages"
    if not number.exists():
        pytest.skip("the kernel has no huge pages of 2M")
    before, free = int(number.read_text()), int((_FOLDER / "free_hugepages").read_text())
    wanted = before + max(0, count - free)
    try:
        number.write_text(str(wanted))
    except OSError:
        pytest.skip(f"huge pages must be reserved by root: echo {wanted} | sudo tee {number}")
    try:
        if int(number.read_text()) < wanted:
            pytest.skip(f"the kernel has no contiguous memory for {count} huge pages of 2M")
        yield
    finally:
        number.write_text(str(before))
