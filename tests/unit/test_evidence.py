"""Evidence is loaded as it was saved, and a damaged file is reported."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmaproof.errors import UntestableError
from dmaproof.evidence import HARVEST, Evidence, Slot
from dmaproof.iova_bitmap import IovaRange
from dmaproof.journal import RECORD
from dmaproof.trace import TRACED_LINKS, PageEpochs
from dmaproof.units import PAGE_BYTES as PAGE

FILE = "evidence.npz"


def some_evidence() -> Evidence:
    links = {}
    for number, link in enumerate(TRACED_LINKS):
        links[link] = PageEpochs([IovaRange(0, 8 * PAGE), IovaRange(1 << 32, 2 * PAGE)])
        links[link].array[:] = np.arange(10) + number
    records, harvests = np.zeros(3, RECORD), np.zeros(2, HARVEST)
    records["gpa"], harvests["pages"] = (1, 2, (1 << 64) - 1), (5, 6)
    return Evidence(
        slots=[Slot(0, 8 * PAGE, 0, 5, 9), Slot(1 << 32, 2 * PAGE, 8 * PAGE, 5, 9)],
        records=records,
        links=links,
        harvests=harvests,
        started_ns=77,
        requests=12,
    )


def test_loaded_evidence_equals_what_was_saved(tmp_path: Path) -> None:
    saved = some_evidence()
    saved.save(tmp_path)
    loaded = Evidence.load(tmp_path)
    for name in ("slots", "started_ns", "requests"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert (loaded.records == saved.records).all()
    assert (loaded.harvests == saved.harvests).all()
    for link in TRACED_LINKS:
        assert loaded.links[link].ranges == saved.links[link].ranges
        assert (loaded.links[link].array == saved.links[link].array).all()


def test_numbers_of_64_bits_come_back_exactly(tmp_path: Path) -> None:
    largest = (1 << 64) - 1
    saved = replace(
        some_evidence(),
        slots=[Slot(0, PAGE, 0, 5, largest), Slot((1 << 63) + PAGE, PAGE, PAGE, largest - 1, 9)],
        started_ns=largest,
        requests=largest,
    )
    saved.save(tmp_path)
    loaded = Evidence.load(tmp_path)
    assert loaded.slots == saved.slots
    assert (loaded.started_ns, loaded.requests) == (largest, largest)


def test_evidence_without_logging_has_no_start_time(tmp_path: Path) -> None:
    Evidence([], np.zeros(0, RECORD), some_evidence().links, np.zeros(0, HARVEST), None, 0).save(
        tmp_path
    )
    assert Evidence.load(tmp_path).started_ns is None


def test_missing_evidence_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match=r"evidence.npz cannot be read"):
        Evidence.load(tmp_path)


def test_truncated_evidence_is_refused(tmp_path: Path) -> None:
    some_evidence().save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / FILE).write_bytes(whole[:length])
        with pytest.raises(UntestableError, match="cannot be read"):
            Evidence.load(tmp_path)


def test_damaged_evidence_is_refused(tmp_path: Path) -> None:
    some_evidence().save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    chance = random.Random(4)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / FILE).write_bytes(damaged)
        try:
            Evidence.load(tmp_path)  # damage to most of a zip file's headers has no effect
        except UntestableError:
            refused += 1
    assert refused > 300


def test_records_of_another_type_are_refused(tmp_path: Path) -> None:
    some_evidence().save(tmp_path)
    with np.load(tmp_path / FILE) as arrays:
        parts = {name: arrays[name] for name in arrays.files}
    np.savez(tmp_path / FILE, **{**parts, "records": np.zeros(3)})
    with pytest.raises(UntestableError, match="records of float64"):
        Evidence.load(tmp_path)
