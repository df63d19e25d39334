"""A fault trial without a verdict: the JSON has the whole reason, and the table its first line."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.testbed import fault_trials
from qmp_tools.testbed.fault_trials import CONTROL, Bench, Row

REASON = "the device of the test bed: it has ended\nAssertionError: the last line of its log"


def test_a_trial_without_a_verdict_keeps_the_whole_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise UntestableError(REASON)

    monkeypatch.setattr(fault_trials, "simulate", fail)
    trial = fault_trials.try_on_testbed(CONTROL, 1, tmp_path, 60)
    row = Row(CONTROL, "", "control", Bench.TESTBED, [trial])
    assert row.to_json()["trials"][0]["untested"] == REASON
    assert f"not tested: {REASON.splitlines()[0]}" in row.cells()
