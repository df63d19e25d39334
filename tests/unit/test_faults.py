"""Planted faults: just the chosen pages are spoilt, and the choice can be repeated."""

from __future__ import annotations

import numpy as np
import pytest

from dmaproof.dirty_log import BufferDirtyLog
from dmaproof.errors import UsageError
from dmaproof.faults import plant

PAGES = 64 * 1024


def merged(
    spec: str | None, seed: int, words: np.ndarray[tuple[int], np.dtype[np.uint64]], gpa: int = 0
) -> tuple[set[int], set[int]]:
    """The pages that reach the log, and those that the fault says it kept."""
    log = bytearray(2 * PAGES // 8)
    fault = plant(spec, seed)
    wrapped = fault.wrap_log(BufferDirtyLog(log))
    wrapped.merge(gpa, words, 0, len(words) * 64)
    bits = np.unpackbits(np.frombuffer(log, np.uint8), bitorder="little")
    wrapped.close()
    return set(np.flatnonzero(bits).tolist()), {int(gpa) // 4096 for gpa in fault.planted()}


def test_what_is_not_planted_arrives() -> None:
    words = np.full(PAGES // 64, ~np.uint64(0))
    arrived, planted = merged("drop-pages=0.01", 5, words)
    assert arrived.isdisjoint(planted)
    assert arrived | planted == set(range(PAGES))
    assert 0.008 < len(planted) / PAGES < 0.012


def test_the_choice_follows_from_the_seed_and_the_page() -> None:
    words = np.full(16, ~np.uint64(0))
    assert merged("drop-pages=0.1", 1, words) == merged("drop-pages=0.1", 1, words)
    assert merged("drop-pages=0.1", 1, words) != merged("drop-pages=0.1", 2, words)
    # The same page is chosen in whichever merge it comes.
    _, whole = merged("drop-pages=0.1", 1, words)
    _, part = merged("drop-pages=0.1", 1, words[:8], gpa=8 * 64 * 4096)
    assert part == {page for page in whole if page >= 512}


def test_clean_pages_are_never_planted() -> None:
    arrived, planted = merged("drop-pages=1", 1, np.array([0b101], dtype=np.uint64))
    assert (arrived, planted) == (set(), {0, 2})
    assert merged(None, 1, np.array([0b101], dtype=np.uint64)) == ({0, 2}, set())


@pytest.mark.parametrize(
    "spec",
    [
        "drop-pages",
        "drop-pages=",
        "drop-pages=0",
        "drop-pages=1.1",
        "drop-pages=nan",
        "gremlins=1",
        "",
    ],
)
def test_what_is_no_fault_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="fault"):
        plant(spec, 1)
