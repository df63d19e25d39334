"""Huge pages, reserved for a test and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from qmp_tools.qemu.machine import format_memory
from qmp_tools.qemu.memory_backend import parse_memory_backend


@contextlib.contextmanager
def reserved(kind: str, count: int) -> Iterator[None]:
    """Have at least `count` free pages of the memory backend `kind` until the context ends.

    Skip the test if this machine cannot reserve them. Only one process may do this at a time.
    """
    backend = parse_memory_backend(kind)
    size = format_memory(backend.page_bytes)
    folder = backend.page_counters()
    number = folder / "nr_hugepages"
    if not number.exists():
        pytest.skip(f"the kernel has no huge pages of {size}")
    before, free = int(number.read_text()), int((folder / "free_hugepages").read_text())
    wanted = before + max(0, count - free)
    try:
        number.write_text(str(wanted))
    except OSError:
        pytest.skip(f"huge pages must be reserved by root: echo {wanted} | sudo tee {number}")
    try:
        if int(number.read_text()) < wanted:
            pytest.skip(f"the kernel has no contiguous memory for {count} huge pages of {size}")
        yield
    finally:
        number.write_text(str(before))
