"""What the passthrough proofs reckon with, outside L1."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmaproof.errors import TrackerError, UntestableError
from dmaproof.iova_bitmap import IovaRange
from qmp_tools.l1.root import run_inside
from qmp_tools.passthrough import differential
from qmp_tools.passthrough.fake_device import content, dropped_pages
from qmp_tools.passthrough.outcome import ProofFailedError, require, run
from qmp_tools.passthrough.prove import to_json, to_text

PAGE = 4096
JOURNAL = np.dtype([("sequence", "<u8"), ("iova", "<u8"), ("length", "<u8")])


def splitmix(value: int) -> int:
    mask = (1 << 64) - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


@pytest.mark.parametrize(("iova", "length"), [(0, 8), (5, 1), (4091, 13), (1 << 40, 4096)])
def test_content_is_what_control_h_says(iova: int, length: int) -> None:
    sequence = 3
    expected = bytes(
        splitmix(sequence * 0x9E3779B97F4A7C15 & (1 << 64) - 1 ^ at // 8) >> at % 8 * 8 & 0xFF
        for at in range(iova, iova + length)
    )
    assert content(sequence, iova, length).tobytes() == expected
    assert content(sequence + 1, iova, 16).tobytes() != content(sequence, iova, 16).tobytes()


def test_dropped_pages_are_about_as_many_as_asked_for() -> None:
    pages = np.arange(100_000, dtype=np.uint64)
    for drop in (0, 50, 1000):
        share = float(dropped_pages(pages, drop, 1).mean())
        assert abs(share - drop / 1000) < 0.01
    assert (dropped_pages(pages, 50, 1) != dropped_pages(pages, 50, 2)).any()


def test_expected_bits_of_writes_that_are_cut_by_the_question() -> None:
    journal = np.array([(1, PAGE - 1, 2), (2, 3 * PAGE, 1), (3, 9 * PAGE, 4 * PAGE)], dtype=JOURNAL)
    bits = differential.expected_bits(journal, IovaRange(PAGE, 9 * PAGE), PAGE)
    assert int(bits[0]) == 0b1_0000_0101


def test_pages_with_few_bytes_written_need_not_have_changed() -> None:
    journal = np.array([(1, 1, 1), (2, 2 * PAGE - 1, 2 * PAGE), (3, 5 * PAGE, 16)], dtype=JOURNAL)
    sure = differential._surely_changed(journal, IovaRange(0, 8 * PAGE))
    assert np.flatnonzero(sure).tolist() == [2, 3, 5]


def test_random_writes_stay_inside_the_window() -> None:
    window = IovaRange(1 << 32, 1 << 20)
    writes = differential.random_writes(random.Random(1), window, 2000)
    assert all(
        window.iova <= iova and iova + length <= sum(window) and length > 0
        for iova, length in writes
    )
    assert any(iova % PAGE for iova, _ in writes)
    assert any(length > 4 * PAGE for _, length in writes)


def test_a_proof_that_does_not_hold_is_told_and_not_raised() -> None:
    def fails() -> tuple[str, dict[str, Any]]:
        require(False, "3 pages missing")
        return "never", {}

    def breaks() -> tuple[str, dict[str, Any]]:
        raise TrackerError("EINVAL")

    def holds() -> tuple[str, dict[str, Any]]:
        require(True, "nothing")
        return "equal", {"cases": 1}

    outcomes = [run("group", "name", proof) for proof in (fails, breaks, holds)]
    assert [it.passed for it in outcomes] == [False, False, True]
    assert [it.found for it in outcomes] == ["3 pages missing", "EINVAL", "equal"]
    with pytest.raises(ProofFailedError):
        fails()


def test_the_report_counts_by_group_and_shows_failures() -> None:
    rows = [
        {"group": "rules", "name": "a", "passed": True, "found": "x", "figures": {}},
        {"group": "rules", "name": "b", "passed": False, "found": "no error", "figures": {}},
    ]
    found = {"kernel": "7.3", "seed": 1, "seconds": 9.0, "outcomes": rows}
    text = to_text(to_json(found))
    assert text.startswith("FAIL: 1 proofs do not hold: the passthrough route on kernel 7.3")
    assert to_json(found)["exit_code"] == 1
    assert "1 of 2 hold" in text
    assert "FAILED rules: b: no error" in text
    assert to_text(to_json({**found, "outcomes": rows[:1]})).startswith("PASS: every proof holds")


def test_a_command_inside_that_fails_tells_what_it_said(tmp_path: Path) -> None:
    for name in ("dev", "proc", "mnt", "inside"):
        (tmp_path / name).mkdir()
    with pytest.raises(UntestableError, match="building nothing failed"):
        run_inside(tmp_path, tmp_path / "inside", "true", "building nothing", 30.0)


def test_what_runs_in_l1_needs_nothing_that_l1_has_not() -> None:
    script = (
        "import sys\n"
        "for name in ('rich', 'packaging', 'jsonschema', 'matplotlib', 'pytest', 'avocado'):\n"
        "    sys.modules[name] = None\n"
        "import qmp_tools.passthrough.inside, qmp_tools.passthrough.owned_proof\n"
        "import qmp_tools.passthrough.vhost_device\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
